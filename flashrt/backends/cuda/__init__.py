"""The CUDA backend: raw kernels compiled by NVRTC, graphs captured through the driver API."""
