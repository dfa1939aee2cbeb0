"""The Triton kernels of the torch runtime, and the choice of one for each shape; imported on CUDA devices only."""
