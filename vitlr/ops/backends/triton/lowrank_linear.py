"""Triton's candidates of `lowrank_linear`: one pass by blocks of rows, or two launches that split the sums."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vitlr.ops.backends import triton
from vitlr.ops.dispatch import floors, registry
from vitlr.ops.layers.lowrank_linear import OP, Key, roofline

_MODULES = {"row_block": "lowrank_linear", "split": "lowrank_linear_split"}


def row_block_floor(key: Key, ceilings: registry.Ceilings) -> float | None:
    """The floor of one pass in µs by programs of BM rows."""
    config, kernels, target = _tiles("row_block", _row_block_sizes(key), key.device)
    each = max(2 * config.BM * key.r * (key.K + key.N), triton.issued(config.BM * key.N, key.act, target))
    programs = kernels.tiles(key.M or 0, config)
    return floors.in_waves(each, programs, target.sms, roofline(key).bytes, key.dtype, ceilings)


def split_floor(key: Key, ceilings: registry.Ceilings) -> float | None:
    """The floor of both launches in µs: the partial sums of the intermediate are written and read once."""
    config, kernels, target = _tiles("split", _split_sizes(key), key.device)
    M, K, N, r, size = key.M or 0, key.K, key.N, key.r, key.dtype.itemsize
    partial = M * r * (size if config.splits == 1 else 4 * config.splits)
    shrinking, expanding = kernels.tiles(M, N, r, config)
    tile = config.BM * config.BN
    steps = (
        (2 * config.BM * config.BR * K // config.splits, shrinking, size * (M + r) * K + partial),
        (
            max(2 * tile * r, triton.issued(tile, key.act, target)),
            expanding,
            size * (r + M * (1 + key.residual)) * N + partial,
        ),
    )
    times = [floors.in_waves(each, programs, target.sms, moved, key.dtype, ceilings) for each, programs, moved in steps]
    return None if None in times else sum(time for time in times if time is not None)


def _row_block_sizes(key: Key) -> tuple:
    return key.M, key.K, key.N, key.r, key.residual, key.dtype


def _split_sizes(key: Key) -> tuple:
    return key.M, key.K, key.N, key.r, key.dtype


def _tiles(variant: str, sizes: tuple, device: torch.device) -> tuple[Any, Any, Any]:
    """The config of a variant, its module, and the target of the device."""
    config = triton.config(_MODULES[variant], variant, device, *sizes)
    return config, triton.kernels(_MODULES[variant]), triton.target_of(device)


# The later one is taken where neither beats plain torch.
for _name, _sizes, _floor in (
    ("row_block", _row_block_sizes, row_block_floor),
    ("split", _split_sizes, split_floor),
):
    _worth = functools.partial(floors.pays, OP, f"triton.{_name}")
    registry.register(OP, triton.candidate(_name, _MODULES[_name], _name, _sizes, "run", worth=_worth, floor=_floor))
