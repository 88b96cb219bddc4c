"""Rank 1: the mechanism. No model, no policy, no CUDA import. Import the modules; nothing is re-
exported here.
"""
