"""Triton kernels of the CUDA path; the pure-torch functions are their definition."""
