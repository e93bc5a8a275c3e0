"""Data sets: one file each, with its settings, its facts and where it comes from."""
