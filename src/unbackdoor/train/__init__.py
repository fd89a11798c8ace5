"""The training loop, losses and the shared pieces of methods that train."""
