"""Emitters: the TIR of one operation each."""
