"""Rank 6: what people look at: arena map, session tree, plots, units. Import the modules."""
