"""The CUDA backend and its kernels on any CPU: a driver double and a fiber per CUDA thread."""
