"""Rank 4: a model, its weights and a backend, planned, loaded and sealed; verbs on lanes."""
