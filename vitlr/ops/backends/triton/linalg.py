"""Triton's candidates of the Gram update, of `W C Wᵀ`, and of the solve that begins with one."""

from __future__ import annotations

import torch

from vitlr.ops.backends import triton
from vitlr.ops.dispatch import floors, registry
from vitlr.ops.linalg import batched_solve, gram, weighted_gram_chain


def _gram_sizes(key: gram.Key) -> tuple[int, int, bool, torch.dtype]:
    return key.T, key.n, key.weighted, key.dtype


def _gram_floor(key: gram.Key, ceilings: registry.Ceilings) -> float | None:
    """Whole tiles in whole waves, or the bytes, in µs; over 132 processors, as the known ceilings are an H200's."""
    kernels, target = triton.kernels("gram"), triton.kernels("targets").TARGETS["sm_90"]
    config = kernels.config(*_gram_sizes(key), target)
    tiles = kernels.tiles(key.n, config)
    stretches, steps = kernels.split(key.T, tiles, config.BT, target.sms)
    each = 2 * config.BM**2 * steps * config.BT
    size, products = gram.roofline(key).bytes, torch.float32 if key.weighted else key.dtype
    return floors.in_waves(each, tiles * stretches, target.sms, size, products, ceilings)


_chain = triton.candidate("chain", "weighted_gram_chain", "config", lambda key: (key.b, key.m, key.k, key.dtype), "run")


def _solve_supports(key: batched_solve.Key) -> str | None:
    """Why the kernel cannot take the reference's `Lᵀ M L`, which is what `VITLR_BACKEND=triton` means here."""
    return _chain.supports(weighted_gram_chain.Key(key.b, key.n, key.n, key.dtype, key.device))


registry.register(gram.OP, triton.candidate("split_rows", "gram", "config", _gram_sizes, "run", floor=_gram_floor))
registry.register(weighted_gram_chain.OP, _chain)
registry.register(batched_solve.OP, registry.Candidate("triton.chain", _solve_supports, batched_solve.reference))
