"""Measured choices: speculation lengths, tile sizes and thread splits."""
