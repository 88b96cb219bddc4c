"""Rank 4: a model, its weights and a backend, planned, loaded, captured and sealed; verbs on lanes."""
