"""Triton's candidate of `lowrank_glu`: one launch by blocks of rows."""

from __future__ import annotations

import functools
from typing import Any

from vitlr.ops.backends import triton
from vitlr.ops.dispatch import floors, registry
from vitlr.ops.layers.lowrank_glu import OP, Key, roofline


def row_block_floor(key: Key, ceilings: registry.Ceilings, target: Any = None) -> float | None:
    """The floor of one launch in µs: whole waves of row blocks, activations, compulsory bytes.

    `target`: of `triton_kernels.targets`, in place of the key's device.
    """
    kernels, target, floor = triton.kernels(OP), target or triton.target_of(key.device), roofline(key)
    programs = kernels.tiles(key.M or 1, kernels.row_block(*_sizes(key), target))
    work = max(floor.flops, triton.issued((key.M or 0) * key.D, key.act, target))
    return floors.in_waves(work / programs, programs, target.sms, floor.bytes, key.dtype, ceilings)


def _sizes(key: Key) -> tuple:
    return key.M, key.K, key.D, key.N, key.rg, key.rv, key.r2, key.shared, key.dtype


_worth = functools.partial(floors.pays, OP, "triton.row_block")
registry.register(
    OP, triton.candidate("row_block", OP, "row_block", _sizes, "run", worth=_worth, floor=row_block_floor)
)
