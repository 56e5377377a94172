"""Operations: each with its specification in plain torch, and the kernels that may run in its place."""

from vitlr.ops import backends  # noqa: F401 (registers the candidates)
from vitlr.ops.dispatch.registry import Candidate, Explanation, candidates, explain, register, select, unregister
from vitlr.ops.layers import (
    attention,
    fp8_chain,
    int8_attention,
    int8_chain,
    lowrank_glu,
    lowrank_linear,
    lowrank_mlp,
    lowrank_residual_linear,
)
from vitlr.ops.linalg import batched_solve, gram, weighted_gram_chain

__all__ = [
    "Candidate",
    "Explanation",
    "attention",
    "batched_solve",
    "candidates",
    "explain",
    "fp8_chain",
    "gram",
    "int8_attention",
    "int8_chain",
    "lowrank_glu",
    "lowrank_linear",
    "lowrank_mlp",
    "lowrank_residual_linear",
    "register",
    "select",
    "unregister",
    "weighted_gram_chain",
]
