"""Attacks, one a file; the file name is the attack's name."""
