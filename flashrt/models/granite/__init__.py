"""Granite-4.0-H: layers of Mamba-2 with attention among them."""
