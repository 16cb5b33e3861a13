"""Finds how an artifact speculates best on this machine: records, measures, predicts, then tries the best."""
