"""Symmetric matrices as their upper triangles, row after row: half the bytes of the whole, and the same numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BLOCK = 256  # rows mirrored together


def length(n: int) -> int:
    """How many entries the triangle of `[n, n]` has, `n (n + 1) / 2`."""
    return n * (n + 1) // 2


def order(entries: int) -> int:
    """The n of a triangle of so many entries."""
    return (math.isqrt(8 * entries + 1) - 1) // 2


def triangle(C: Tensor) -> Tensor:
    """The upper triangle of C [n, n], `[n (n + 1) / 2]`: C[0, 0:], C[1, 1:], and so on."""
    return torch.cat([row[i:] for i, row in enumerate(C)]) if len(C) else C.flatten()


def square(entries: Tensor) -> Tensor:
    """C [n, n], whole and exactly symmetric, of its triangle."""
    n = order(len(entries))
    C = entries.new_empty(n, n)
    for i, row in enumerate(entries.split(list(range(n, 0, -1)))):
        C[i, i:] = row
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        corner = C[start:end, start:end].triu()
        C[start:end, start:end] = corner + corner.triu(1).mT
        C[end:, start:end] = C[start:end, end:].mT
    return C
