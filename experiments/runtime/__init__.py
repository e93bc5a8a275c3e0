"""What every job stands on: its directory, its processes, its log, its errors."""
