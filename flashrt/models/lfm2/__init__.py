"""LFM2 and LFM2.5, dense or with experts: gated short convolutions with attention among them."""
