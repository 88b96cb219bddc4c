"""Qwen3.5 and Qwen3-Next, dense or with experts: Gated DeltaNet with attention among them."""
