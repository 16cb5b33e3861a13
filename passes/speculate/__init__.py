"""Passes that derive drafts and speculation levels."""
