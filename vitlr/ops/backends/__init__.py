"""Who runs operations: candidates on the CPU, in CUDA and in Triton. They import operations, never the other way."""
