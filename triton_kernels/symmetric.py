"""Symmetric results: one program for every tile of the lower triangle."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def triangle(tile):
    """Row i and column j <= i of a tile, for tiles counted row by row: tile = i (i + 1) / 2 + j."""
    i = ((tl.sqrt((8 * tile + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)  # the root is rounded
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    return i, tile - i * (i + 1) // 2
