"""Loads an artifact and decodes with it, without torch or transformers."""
