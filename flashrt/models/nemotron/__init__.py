"""Nemotron-H and Nemotron Nano v2: Mamba-2, attention or an MLP in each layer."""
