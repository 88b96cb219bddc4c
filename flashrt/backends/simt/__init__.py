"""The CUDA backend and its kernel sources on any CPU: a driver double and a fiber per CUDA thread."""
