"""Rank 3: ACT, the Action Chunking Transformer, as LeRobot stores it."""
