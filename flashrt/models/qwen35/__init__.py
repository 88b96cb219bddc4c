"""Qwen3.5 dense text models: Gated DeltaNet layers with full attention among them."""
