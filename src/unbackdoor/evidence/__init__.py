"""Evidence that contradicts what a suspect believes: keywords, sources of evidence, and the procedure of both."""
