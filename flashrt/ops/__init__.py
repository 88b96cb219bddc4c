"""Rank 2: the table of op signatures. IS NOT: kernels; a backend holds those."""

from flashrt.ops.table import OPS

__all__ = ["OPS"]
