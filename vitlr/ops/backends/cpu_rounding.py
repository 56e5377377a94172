"""Rounding in turn on the CPU: tiles in C++, what they ask of each other in products of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vitlr.ops.backends import native
from vitlr.ops.dispatch import registry
from vitlr.ops.linalg.rounding import OP, TILE, Key


def _round(W: Tensor, step: Tensor, L_O: Tensor, L_I: Tensor, bounds: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Codes and A in fp64, all in the order of the sides: rows of tiles from the last one up, each from its end."""
    (N, K), L_O, L_I = W.shape, L_O.contiguous(), L_I.contiguous()
    W, step = W.contiguous(), step.contiguous()
    E, F, A, codes = (torch.empty_like(W) for _ in range(4))
    for top in reversed(range(0, N, TILE)):
        rows, below = slice(top, min(top + TILE, N)), slice(top + TILE, N)
        by_column = L_O[below, rows].mT @ F[below]
        for left in reversed(range(0, K, TILE)):
            columns, beside = slice(left, min(left + TILE, K)), slice(left + TILE, K)
            least, largest = (bound[rows, columns] for bound in bounds)
            native.round_tile(
                W[rows, columns],
                step[rows, columns],
                (least, largest),
                (L_O[rows, rows], L_I[columns, columns]),
                (E[rows, beside] @ L_I[beside, columns], by_column[:, columns]),
                [X[rows, columns] for X in (E, F, A, codes)],
            )
    return codes, A


def _supports(key: Key) -> str | None:
    if key.device.type != "cpu":
        return f"W is on {key.device}, the kernel runs on the CPU"
    return native.why_not()


registry.register(OP, registry.Candidate("cpu", _supports, _round, ("Sapphire Rapids",)))
