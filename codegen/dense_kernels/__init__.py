"""Kernels of convolutions and matrix products, by what they compute; they know nothing of graphs."""
