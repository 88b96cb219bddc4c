"""Formats of stored weights: what a file holds, as codes and planes of scales, or as values."""
