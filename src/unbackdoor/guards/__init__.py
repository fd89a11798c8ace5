"""Guards: what acts when a model is asked, one a file; the file's name is the guard's name."""
