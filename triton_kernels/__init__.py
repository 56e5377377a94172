"""The Triton kernels, one file an operation. They know tensors only and import nothing of vitlr.

Every operation has a `config` function, which says what its kernel takes and with which tiles, and a `run` function.
"""
