"""Rank 2: capsules: frozen states, the table that makes them, where their bytes are, files."""
