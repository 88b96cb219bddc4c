"""LFM2 and LFM2.5, dense: gated short convolutions with attention among them."""
