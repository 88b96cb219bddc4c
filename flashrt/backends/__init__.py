"""Rank 2: devices. Each folder implements `core.backend.Backend`; none knows a model."""
