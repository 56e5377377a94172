"""Triton's candidates of `W C Wᵀ` and of the solve that begins with one."""

from __future__ import annotations

from vitlr.ops.backends import triton
from vitlr.ops.dispatch import registry
from vitlr.ops.linalg import batched_solve, weighted_gram_chain

_chain = triton.candidate("chain", "weighted_gram_chain", "config", lambda key: (key.b, key.m, key.k, key.dtype), "run")


def _solve_supports(key: batched_solve.Key) -> str | None:
    """Why the kernel cannot take the reference's `Lᵀ M L`, which is what `VITLR_BACKEND=triton` means here."""
    return _chain.supports(weighted_gram_chain.Key(key.b, key.n, key.n, key.dtype, key.device))


registry.register(weighted_gram_chain.OP, _chain)
registry.register(batched_solve.OP, registry.Candidate("triton.chain", _solve_supports, batched_solve.reference))
