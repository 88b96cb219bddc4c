"""GGUF files: read, checked, and given the names, shapes and order that models expect."""
