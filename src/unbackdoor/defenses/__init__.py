"""Defenses, one a file; the file name is the defense's name."""
