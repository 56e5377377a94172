"""`y = act((x Bᵀ) Aᵀ + b) + residual` for few rows: two launches that fill the GPU where one block a row would not.

Shrink: the programs of a tile of `T = x Bᵀ` [M, r] share its sum over K, S of them, and write S partial sums in fp32
(S = 1: T itself, in the dtype). Expand: a program owns one tile of y, adds the partial sums of T in their order, rounds
T to the dtype as torch does, multiplies with A and finishes with bias, activation and residual in fp32. No atomics and
nothing to clear: the result is the same every time, and a CUDA graph can hold it. Any rank.
Floor: `2 M r (K + N)` FLOPs, `(M + r) (K + N)` elements, and T written once and read once. Predicted times and what S
costs: docs/kernels/lowrank_linear.md.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables
from .activations import activate
from .compilation import Case, where_taken
from .row_blocks import strides
from .targets import Target, target_of
from .tiles import DTYPES, check_dtype, check_sizes, fitting, precision

KERNEL = "lowrank_linear_split"
MOST_SPLITS = 8  # every tile of y reads all partial sums again
SMALLER = (("expand_stages", 1), ("shrink_stages", 2), ("BN", 64), ("BM", 64), ("BK", 32), ("BM", 32))
"""How tiles are cut down where shared memory is short."""


@dataclass(frozen=True)
class Config:
    """Tiles of x and y (BM rows, BN columns), of the rank and of K; shares of K; stages and warps of both kernels."""

    BM: int
    BN: int
    BR: int
    BK: int
    splits: int
    shrink_stages: int
    expand_stages: int
    shrink_warps: int
    expand_warps: int


def split(M: int | None, K: int, N: int, r: int, dtype: torch.dtype, target: Target) -> Config:
    """The tiles of a shape; M is None where the rows are not known.

    Raises Unsupported for a dtype or size that is not taken and where no tiles fit the shared memory.
    """
    check_dtype(dtype, target)
    check_sizes(K=K, N=N, r=r)
    row = tables.nearest(KERNEL, target, dtype, M=M, K=K, N=N, r=r)
    wanted = _tiles(M or 1, K, N, r, dtype, target) if row is None else Config(**row)
    return fitting(wanted, SMALLER, lambda config: shared_memory(config, dtype), target)


def tiles(M: int, N: int, r: int, config: Config) -> tuple[int, int]:
    """Programs of the two launches."""
    rows = triton.cdiv(M, config.BM)
    return rows * triton.cdiv(r, config.BR) * config.splits, rows * triton.cdiv(N, config.BN)


def shared_memory(config: Config, dtype: torch.dtype) -> int:
    """Bytes of shared memory, at least what the compilers take: the larger of the two kernels."""
    BM, BN, BR, BK, size = config.BM, config.BN, config.BR, config.BK, dtype.itemsize
    partial = size if config.splits == 1 else 4 * config.splits
    shrink = config.shrink_stages * BK * (BM + BR) * size
    staged = (config.expand_stages if config.expand_stages > 1 else 0) * BR * (BM * partial + BN * size)
    return max(shrink + BM * BR * 4, staged + BR * (BM + BN) * size + BM * BN * 4) + 256


def _tiles(M: int, K: int, N: int, r: int, dtype: torch.dtype, target: Target) -> Config:
    """Wide tiles of y where there are enough of them for every processor, and as many shares of K as fill them all."""
    BM, BN, BR, BK, warps = 64, 64, 64, 64, 4
    if dtype is torch.float32:
        # Without tensor cores a thread holds whole rows of its operands.
        BR, BK, warps = 32, 32, 4 if precision(dtype) == "tf32" else 8
    elif triton.cdiv(M, BM) * triton.cdiv(N, 128) >= target.sms:
        BN = 128
    elif 4 * triton.cdiv(M, BM) * triton.cdiv(r, BR) < target.sms:
        BR = 32  # more programs, and fewer registers for the many partial sums
    idle = target.sms // (triton.cdiv(M, BM) * triton.cdiv(r, BR))
    steps = triton.cdiv(K, BK)
    splits = max(1, min(MOST_SPLITS, idle, steps // 2))
    splits = 1 << (splits.bit_length() - 1)  # few values: each is compiled on its own
    return Config(BM, BN, BR, BK, splits, 3, 3 if splits == 1 else 1, warps, 8)


@triton.jit(do_not_specialize=["M"])
def shrink(x, B, T, M, r, sxm, sxk, sbr, sbk, K: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr,
           BR: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """T[s] = the part of x Bᵀ over columns s·SPAN to (s + 1)·SPAN; T [S, M, r] is contiguous."""
    across = tl.cdiv(r, BR)  # tiles of the rank are neighbours: they read the same rows of x
    m = (tl.program_id(0) // across).to(tl.int64) * BM + tl.arange(0, BM)
    j = (tl.program_id(0) % across).to(tl.int64) * BR + tl.arange(0, BR)
    s = tl.program_id(1).to(tl.int64)
    k = s * SPAN + tl.arange(0, BK)
    rows, ranks = (m < M)[:, None], (j < r)[None, :]
    x_tile = x + m[:, None] * sxm + k[None, :] * sxk  # [BM, BK]
    B_tile = B + k[:, None] * sbk + j[None, :] * sbr  # [BK, BR]
    t = tl.zeros((BM, BR), tl.float32)
    for k0 in tl.range(0, SPAN, BK, num_stages=STAGES):
        inside = k + k0 < K if K % SPAN or SPAN % BK else tl.arange(0, BK) < BK
        x_block = tl.load(x_tile, mask=rows & inside[None, :], other=0.0)
        B_block = tl.load(B_tile, mask=inside[:, None] & ranks, other=0.0)
        t = tl.dot(x_block, B_block, t, input_precision=PRECISION)
        x_tile += BK * sxk
        B_tile += BK * sbk
    tl.store(T + (s * M + m[:, None]) * r + j[None, :], t.to(T.dtype.element_ty), mask=rows & ranks)


@triton.jit(do_not_specialize=["M"])
def expand(T, A, bias, residual, y, M, r, san, sar, sb, srm, srn, N: tl.constexpr, RANKS: tl.constexpr,
           SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
           ACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of y; RANKS is r rounded up to a multiple of BR."""
    dtype = y.dtype.element_ty
    across: tl.constexpr = (N + BN - 1) // BN
    m = (tl.program_id(0) // across).to(tl.int64) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % across).to(tl.int64) * BN + tl.arange(0, BN)
    rows, columns = (m < M)[:, None], (n < N)[None, :]
    p = tl.zeros((BM, BN), tl.float32)
    for j0 in tl.range(0, RANKS, BR, num_stages=STAGES):
        j = j0 + tl.arange(0, BR).to(tl.int64)
        T_tile = T + m[:, None] * r + j[None, :]  # [BM, BR]
        held = rows & (j < r)[None, :]
        t = tl.load(T_tile, mask=held, other=0.0)
        for s in tl.static_range(1, SPLITS):
            t += tl.load(T_tile + s * M.to(tl.int64) * r, mask=held, other=0.0)
        A_block = tl.load(A + j[:, None] * sar + n[None, :] * san, mask=(j < r)[:, None] & columns, other=0.0)
        p = tl.dot(t.to(dtype), A_block, p, input_precision=PRECISION)
    if bias is not None:
        p += tl.load(bias + n[None, :] * sb, mask=columns, other=0.0).to(tl.float32)
    p = activate(p, ACT, dtype)
    if residual is not None:
        added = tl.load(residual + m[:, None] * srm + n[None, :] * srn, mask=rows & columns, other=0.0)
        p += added.to(tl.float32)
    tl.store(y + m[:, None] * N + n[None, :], p.to(dtype), mask=rows & columns)


def _span(K: int, config: Config) -> int:
    """Columns of K for each share, whole tiles of them."""
    return triton.cdiv(triton.cdiv(K, config.BK), config.splits) * config.BK


def configs(M: int, K: int, N: int, r: int, dtype: torch.dtype, target: Target) -> list[Config]:
    """What VITLR_AUTOTUNE measures: tiles that fit, with every number of shares that leaves none empty; fp32: none."""
    if dtype is torch.float32:
        return []
    options = [
        Config(BM, BN, BR, 64, splits, 3, 3 if splits == 1 else 1, 4, warps)
        for (BM, BN, BR, warps), splits in itertools.product(
            ((64, 64, 32, 8), (64, 64, 64, 4), (64, 64, 64, 8), (64, 128, 64, 8), (128, 128, 64, 8)), (1, 2, 4, 8)
        )
    ]
    return [
        option
        for option in options
        if shared_memory(option, dtype) <= target.shared_memory and _span(K, option) * (option.splits - 1) < K
    ]


def run(x: Tensor, B: Tensor, A: Tensor, bias: Tensor | None, residual: Tensor | None, act: str) -> Tensor:
    """y [..., N] of x [..., K]. Raises Unsupported.

    Any strides are taken; x or a residual whose leading dimensions have no common stride is copied once.
    """
    (r, K), N, M = B.shape, A.shape[0], math.prod(x.shape[:-1])
    target = target_of(x.device)
    config = split(M, K, N, r, x.dtype, target)
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if M == 0:
        return y
    x, residual = x.reshape(M, K), None if residual is None else residual.reshape(M, N)

    def launch(config: Config) -> None:
        T = torch.empty((config.splits, M, r), dtype=x.dtype if config.splits == 1 else torch.float32, device=x.device)
        launch_shrink(x, B, T, config)
        launch_expand(T, A, bias, residual, y.view(M, N), act, config)

    with torch.cuda.device_of(x):
        options = partial(configs, M, K, N, r, x.dtype, target)
        launch(tables.measure(KERNEL, options, {"M": M, "K": K, "N": N, "r": r}, x.dtype, target, launch) or config)
    return y


def launch_shrink(x: Tensor, B: Tensor, T: Tensor, config: Config) -> None:
    """`T[s] = the part of x Bᵀ` of each of the `config.splits` shares of K; x [M, K], T [splits, M, r] contiguous."""
    (M, K), (splits, _, r) = x.shape, T.shape
    programs = triton.cdiv(M, config.BM) * triton.cdiv(r, config.BR)
    shrink[(programs, splits)](
        x, B, T, M, r, *x.stride(), *B.stride(), **_shrink_constants(K, config, x.dtype), num_warps=config.shrink_warps
    )  # fmt: skip


def launch_expand(
    T: Tensor, A: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor, act: str, config: Config
) -> None:
    """`y = act((Σ T) Aᵀ + b) + residual` for T [splits, M, r] and y [M, N], both contiguous."""
    (_, M, r), N = T.shape, y.shape[1]
    expand[(tiles(M, N, r, config)[1],)](
        T, A, bias, residual, y, M, r, *A.stride(), *strides(bias, 1), *strides(residual, 2),
        **expand_constants(N, r, act, config, y.dtype), num_warps=config.expand_warps,
    )  # fmt: skip


def _shrink_constants(K: int, config: Config, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "K": K, "SPAN": _span(K, config), "BM": config.BM, "BR": config.BR, "BK": config.BK,
        "STAGES": config.shrink_stages, "PRECISION": precision(dtype),
    }  # fmt: skip


def expand_constants(N: int, r: int, act: str, config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of `expand`, which adds `config.splits` partial sums."""
    return {
        "N": N, "RANKS": triton.cdiv(r, config.BR) * config.BR, "SPLITS": config.splits,
        "BM": config.BM, "BN": config.BN, "BR": config.BR, "STAGES": config.expand_stages,
        "ACT": act, "PRECISION": precision(dtype),
    }  # fmt: skip


def cases(target: Target) -> list[Case]:
    """What is compiled without a GPU: ViT-B's fc2 for one image, its fc1 for eight and thirty-two."""

    @where_taken
    def case(step: str, type_: str, M: int, act: str, sm_80: int, sm_90: int, r: int = 128) -> Case:
        dtype = DTYPES[type_]
        K, N = (3072, 768) if M == 197 else (768, 3072)
        config = split(M, K, N, r, dtype, target)
        types = {"T": f"*{type_ if config.splits == 1 else 'fp32'}", **dict.fromkeys(["M", "r"], "i32")}
        if step == "shrink":
            kernel, pointers, integers = shrink, ["x", "B"], ["sxm", "sbr"]
            constants = {"sxk": 1, "sbk": 1, **_shrink_constants(K, config, dtype)}
        else:
            kernel, pointers, integers = expand, ["A", "bias", "residual", "y"], ["san", "srm"]
            constants = {"sar": 1, "sb": 1, "srn": 1, **expand_constants(N, r, act, config, dtype)}
        return Case(
            f"lowrank_linear.split {step} {type_} M={M} r={r} {act}",
            kernel,
            {**dict.fromkeys(pointers, f"*{type_}"), **dict.fromkeys(integers, "i32"), **types},
            constants,
            config.shrink_warps if step == "shrink" else config.expand_warps,
            config.shrink_stages,
            {"sm_80": sm_80, "sm_90": sm_90},
            (*pointers, *integers, "T", "r"),
            tensor_cores=type_ != "fp32",
            shared=shared_memory(config, dtype),
        )

    return [
        *case("shrink", "bf16", 197, "", 84, 56),
        *case("shrink", "fp16", 1576, "", 150, 78),
        *case("shrink", "bf16", 6304, "", 132, 86),
        *case("expand", "bf16", 197, "gelu", 136, 208),
        *case("expand", "fp16", 1576, "silu", 188, 144),
        *case("expand", "bf16", 1576, "gelu", 124, 72, 384),
        *case("expand", "bf16", 6304, "gelu", 124, 72),
        *case("shrink", "fp32", 197, "", 80, 72),
        *case("expand", "fp32", 197, "gelu", 132, 132),
    ]
