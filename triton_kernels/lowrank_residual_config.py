"""With which tiles a low-rank linear and its compact residual run: what the kernel takes, and what fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from . import tables
from .targets import TARGETS, Target, Unsupported
from .tiles import check_dtype, check_sizes, fitting, two_powers

KERNEL = "lowrank_residual_linear"
CODE_BYTES = {"int8": 1.0, "int4": 0.5, "fp8": 1.0}
FP8 = ("sm_89", "sm_90", "sm_100", "sm_120")  # architectures that convert e4m3fn themselves
SMALLER = (("num_stages", 3), ("num_stages", 2), ("BM", 64), ("BM", 32))
"""How tiles are cut down where shared memory is short."""


@dataclass(frozen=True)
class Config:
    """Rows, columns and depth of a tile, warps of a program, stages of its loop over K."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


def one_pass(
    M: int | None, K: int, N: int, r: int, form: str, group_size: int, dtype: torch.dtype, target: Target
) -> Config:
    """The tiles with which T is summed beside Y. Raises Unsupported with the reason, r too large included."""
    limit = 128 if dtype.itemsize == 2 and (target.hopper or target.backend == "interpreter") else 64
    if r > limit:
        raise Unsupported(f"r = {r}, T beside Y leaves registers for r <= {limit}; two_pass takes any rank")
    return _config(M, K, N, r, form, group_size, dtype, target, fused=True)


def two_pass(
    M: int | None, K: int, N: int, r: int, form: str, group_size: int, dtype: torch.dtype, target: Target
) -> Config:
    """The tiles of the second launch, which adds `T Aᵀ`; any rank. Raises Unsupported with the reason."""
    return _config(M, K, N, r, form, group_size, dtype, target, fused=False)


def depth(K: int, form: str, group_size: int, largest: int) -> int:
    """The deepest tile within one group of columns, at most `largest`. Raises Unsupported if there is none."""
    if form == "blockdiag" or group_size >= K:
        return min(largest, max(16, triton.next_power_of_2(min(group_size, K))))
    if group_size % 16:
        raise Unsupported(f"group_size {group_size}, taken are multiples of 16 and one group a row (K = {K})")
    return min(largest, group_size & -group_size)


def chunk(size: int) -> int:
    """Columns of T that the second launch reads at a time; fp32 products run on few registers a thread."""
    return 64 if size == 2 else 16


def shared_memory(config: Config, width: int, form: str, size: int, target: Target) -> int:
    """Bytes of shared memory, never below what the compiler takes: the loop's buffers, or what the end needs.

    `width`: columns of T that are summed along (0: T comes from memory), `size`: bytes of an element of x. Triton 3.8
    lets decoded codes pass through one more tile on Hopper; 3.6 and 3.9 keep them in registers.
    """
    code = CODE_BYTES.get(form, size)
    loop = config.num_stages * config.BK * (size * (config.BM + width) + code * config.BN)
    loop += size * config.BK * config.BN * (target.hopper and form in CODE_BYTES)
    end = 4 * config.BM * config.BN + size * (config.BM + config.BN) * (width or chunk(size) * config.num_stages)
    return int(max(loop, end))


def _config(
    M: int | None, K: int, N: int, r: int, form: str, group_size: int, dtype: torch.dtype, target: Target, fused: bool
) -> Config:
    check_dtype(dtype, target)
    if form not in (*CODE_BYTES, "blockdiag"):
        raise Unsupported(f"form {form!r}, taken are {', '.join(CODE_BYTES)} and blockdiag")
    check_sizes(K=K, N=N, r=r)
    width = summed(r, fused)
    row = tables.nearest(KERNEL, target, dtype, **sizes(M or 12608, K, N, width, form))
    if row is None:  # what fits an A100 fits, after shrinking, the architectures that have no rows of their own
        row = tables.nearest(KERNEL, TARGETS["sm_80"], dtype, **sizes(M or 12608, K, N, width, form))
    assert row is not None, "the table of tiles is missing"
    wanted = Config(**row)
    wanted = replace(wanted, BK=depth(K, form, group_size, wanted.BK))
    return fitting(wanted, SMALLER, lambda config: shared_memory(config, width, form, dtype.itemsize, target), target)


def summed(r: int, fused: bool) -> int:
    """Columns of T that the launch of y sums along: none where T has a launch of its own."""
    return sum(two_powers(r)) if fused else 0


def sizes(M: int, K: int, N: int, width: int, form: str) -> dict[str, int]:
    """By what a row of the table is found; `r` is the width that is summed along, 1 for none."""
    return {"M": M, "K": K, "N": N, "r": max(width, 1), "form": (*CODE_BYTES, "blockdiag").index(form)}


def configs(
    M: int, K: int, N: int, r: int, form: str, group_size: int, dtype: torch.dtype, target: Target, fused: bool
) -> list[Config]:
    """What autotuning tries: the table's own choice and its neighbours that fit."""
    own = _config(M, K, N, r, form, group_size, dtype, target, fused)
    tried, width = [own], summed(r, fused)
    for BM in (16, 32, 64, 128):
        for BN in (64, 128):
            for warps in (4, 8):
                other = replace(own, BM=BM, BN=BN, num_warps=warps)
                shared = shared_memory(other, width, form, dtype.itemsize, target)
                if other not in tried and shared <= target.shared_memory:
                    tried.append(other)
    return tried


def tiles(M: int, K: int, N: int, form: str, group_size: int, config: Config) -> int:
    """Programs of the launch that writes y."""
    return -(-M // config.BM) * _columns(K, N, form, group_size, config.BN)


def _columns(K: int, N: int, form: str, group_size: int, BN: int) -> int:
    """Tiles along N; none lies across two blocks."""
    blocks = K // group_size if form == "blockdiag" else 1
    return blocks * -(-(N // blocks) // BN)


def flops(M: int, K: int, N: int, r: int, form: str, group_size: int, config: Config, fused: bool) -> int:
    """FLOPs of the launch that writes y; `fused`: T again for every tile along N."""
    shrinks = _columns(K, N, form, group_size, config.BN) if fused else 0
    return 2 * M * (shrinks * r * K + r * N + N * (group_size if form == "blockdiag" else K))


def stored(form: str, target: Target) -> str:
    """The form as the kernel takes it: fp8 is decoded by hand where the architecture cannot."""
    return "fp8_bits" if form == "fp8" and target.name not in FP8 else form
