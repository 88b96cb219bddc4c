"""Rank 2: checkpoints -> weight regions, by declarative rules. Import the modules."""
