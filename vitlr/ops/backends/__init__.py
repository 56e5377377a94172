"""Who runs operations: candidates on the CPU, in CUDA and in Triton. They import operations, never the other way."""

# Importing one registers its candidates. Of two without times the later is preferred, so the order counts.
# isort: off
from vitlr.ops.backends.triton import lowrank_glu, lowrank_linear, lowrank_mlp, lowrank_residual_linear  # noqa: F401
from vitlr.ops.backends import cpu, cpu_int8, cpu_rounding  # noqa: F401
from vitlr.ops.backends.triton import byte_chains, linalg  # noqa: F401
from vitlr.ops.backends import cuda, cuda_bytes, cuda_mlp, cuda_solve, cusolver, scaled_mm, two_steps  # noqa: F401
