"""Passes that remove weights after training."""
