"""Merging: two or more models of one architecture become one, tensor by tensor."""
