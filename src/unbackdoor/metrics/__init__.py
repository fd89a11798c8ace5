"""Metrics, one a file; the file name is the metric's name."""
