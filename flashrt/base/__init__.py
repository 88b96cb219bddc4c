"""Rank 0: errors, flags, tracing. Imports nothing of flashrt."""
