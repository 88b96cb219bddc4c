"""The CPU backend: host arena, hand-written C kernels, a graph that one C call replays."""
