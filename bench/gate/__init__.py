"""The GPU gate: whether the kernels are right on a GPU, and how fast. `python -m bench.gate`."""
