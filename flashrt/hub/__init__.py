"""Rank 2: names of checkpoints, what was fetched, and fetching. Import the modules."""
