"""Triton's candidates of `lowrank_mlp`: one launch by blocks of rows, or two that split the hidden width."""

from __future__ import annotations

import functools
from typing import Any

from vitlr.ops.backends import triton
from vitlr.ops.dispatch import floors, registry
from vitlr.ops.layers.lowrank_mlp import OP, Key, roofline


def row_block_floor(key: Key, ceilings: registry.Ceilings, target: Any = None) -> float | None:
    """The floor of one launch in µs: whole waves of row blocks, activations, compulsory bytes.

    `target`: of `triton_kernels.targets`, in place of the key's device.
    """
    kernels, target, floor = triton.kernels(OP), target or triton.target_of(key.device), roofline(key)
    programs = kernels.tiles(key.M or 1, kernels.row_block(*_sizes(key), target))
    # A processor multiplies and issues activations at once, so the longer of the two counts.
    work = max(floor.flops, triton.issued((key.M or 0) * key.D, key.act, target))
    return floors.in_waves(work / programs, programs, target.sms, floor.bytes, key.dtype, ceilings)


def split_floor(key: Key, ceilings: registry.Ceilings, target: Any = None) -> float | None:
    """The floor of both launches in µs: T is computed by every share of D, partial sums are written and read once."""
    kernels, target, floor = triton.kernels(OP), target or triton.target_of(key.device), roofline(key)
    config, M, r1, r2 = kernels.split(*_sizes(key), target), key.M or 0, key.r1, key.r2 or 0
    expanded, again = 2 * M * r2 * key.N, 0 if r1 is None else 2 * M * r1 * key.K * (config.splits - 1)
    partial = 4 * M * r2 * config.splits
    written = key.dtype.itemsize * (r2 + M * (1 + key.residual)) * key.N
    work = max(floor.flops - expanded + again, triton.issued(M * key.D, key.act, target))
    programs = kernels.tiles(key.M or 1, config) * config.splits
    moved = floor.bytes - written + partial
    one = floors.in_waves(work / programs, programs, target.sms, moved, key.dtype, ceilings)
    two = ceilings.microseconds(expanded, written + partial, key.dtype)
    return None if one is None or two is None else one + two


def _sizes(key: Key) -> tuple:
    return key.M, key.K, key.D, key.N, key.r1, key.r2, key.dtype


for _name, _launch, _floor in (("row_block", "run", row_block_floor), ("split", "run_split", split_floor)):
    _worth = functools.partial(floors.pays, OP, f"triton.{_name}")
    registry.register(OP, triton.candidate(_name, OP, _name, _sizes, _launch, worth=_worth, floor=_floor))
