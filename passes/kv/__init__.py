"""Passes that insert and shrink the key-value cache."""
