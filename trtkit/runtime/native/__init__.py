"""Optional C++ kernels for a CPU, compiled on first use; the pure-torch functions are reference and fallback."""
