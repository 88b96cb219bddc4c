"""Rank 2: capsules: a frozen state, the table of an engine's, where their bytes lie, their files."""
