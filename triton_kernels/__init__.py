"""Triton kernels over tensors, one file an operation; installed as `vitlr.triton_kernels`, imports nothing of vitlr."""
