"""One average a file."""
