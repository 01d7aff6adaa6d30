"""Kernels for NVIDIA GPUs and what they share."""
