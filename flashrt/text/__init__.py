"""Rank 2: text <-> token ids, and chat messages -> prompts. Import the modules."""
