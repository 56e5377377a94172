"""Operations: one file each, with its specification in plain torch and the kernels that may run in its place."""

from vitlr.ops import (
    _cpu,  # noqa: F401 (registers its candidates)
    _cuda,  # noqa: F401 (registers its candidates)
    _cuda_solve,  # noqa: F401 (registers its candidates)
    _two_steps,  # noqa: F401 (registers its candidate)
    attention,
    batched_solve,
    gram,
    lowrank_glu,
    lowrank_linear,
    lowrank_mlp,
    lowrank_residual_linear,
    weighted_gram_chain,
)
from vitlr.ops._dispatch import Candidate, Explanation, candidates, explain, register, select, unregister

__all__ = [
    "Candidate",
    "Explanation",
    "attention",
    "batched_solve",
    "candidates",
    "explain",
    "gram",
    "lowrank_glu",
    "lowrank_linear",
    "lowrank_mlp",
    "lowrank_residual_linear",
    "register",
    "select",
    "unregister",
    "weighted_gram_chain",
]
