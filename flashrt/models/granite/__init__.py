"""Granite-4.0-H, dense: layers of Mamba-2 with attention among them."""
