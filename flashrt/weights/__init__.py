"""Rank 2: checkpoints -> weight regions, by declarative rules. Import the modules; nothing is re-exported here."""
