"""Data: formats, sources, splits, poisoned rows, batches."""
