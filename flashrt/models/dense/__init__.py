"""Dense decoders of attention and MLP: Llama, Mistral, Qwen2, Qwen3, SmolLM3."""
