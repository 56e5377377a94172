"""`y = A (B x) + R x + b` in one pass over x, R as codes with group scales or as blocks on the diagonal.

x [M, K], B [r, K], A [N, r], b [N] -> y [M, N]. A program owns a tile [BM, BN] of y. While it walks over K it sums two
products of the same tile of x in fp32 registers: `T = x Bᵀ` [BM, r] and `Yᵀ = R xᵀ` [BN, BM], whose R is scaled to x's
dtype in registers as it comes; then `Yᵀ += A Tᵀ + b`. Yᵀ and not Y, because Hopper's wgmma takes its first operand from
registers: what was just dequantised need not pass through shared memory, and products stay in flight meanwhile.

Floor: 2 M (r (K + N) + K N) FLOPs (blockdiag: N K/nb for K N) over x, y, A, B and the codes once. Every column of tiles
computes T again, 2 M r K FLOPs each: r/BN more than R x itself. `two_pass` computes T once, in a launch of its own,
lowrank_linear_split's first one.
Dense codes save no FLOPs: they save memory and, at few rows, the bytes of W; blocks save FLOPs too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lowrank_linear_split, tables
from .codes import load_codes
from .compilation import Case, where_taken
from .lowrank_residual_config import (
    KERNEL,
    Config,
    chunk,
    configs,
    one_pass,
    shared_memory,
    sizes,
    stored,
    summed,
    tiles,
    two_pass,
)
from .row_blocks import strides, within
from .targets import Target, target_of
from .tiles import DTYPES, precision, two_powers


@triton.jit
def _expand(acc, t, A, n, live, c, r, san, sar, PRECISION: tl.constexpr):
    """acc [BN, BM] += A[n, c] tᵀ for t [BM, R], the columns c of T, zeros beyond the rank."""
    a = tl.load(A + n[:, None] * san + c[None, :] * sar, mask=live[:, None] & (c < r)[None, :], other=0.0)
    return tl.dot(a, t.to(a.dtype).T, acc, input_precision=PRECISION)


@triton.jit
def _residual(
    x, B, A, R, scale, bias, t, y, M, N, r, sxm, sxk, sbr, sbk, san, sar, srb, srn, srk, ssn, ssg, sb,
    K: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    EVEN: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y. R1 + R2 columns of T are summed along; or R1 = 0, and T [M, r] is read in CHUNKS of columns.

    EVEN: the rank is R1 + R2, and nothing of T has to be masked.
    """
    dtype = x.dtype.element_ty
    BLOCKS: tl.constexpr = K // GROUP if FORM == "blockdiag" else 1
    DEPTH: tl.constexpr = K // BLOCKS  # columns of x that this tile of R touches
    rows = N // BLOCKS  # rows of y of a block
    per_block = tl.cdiv(rows, BN)
    # Tiles of one row of tiles run side by side: x comes from memory once, R and B stay in the cache.
    column = tl.program_id(0) % (BLOCKS * per_block)
    m = (tl.program_id(0) // (BLOCKS * per_block)).to(tl.int64) * BM + tl.arange(0, BM)
    block = (column // per_block).to(tl.int64)
    local = (column % per_block).to(tl.int64) * BN + tl.arange(0, BN)
    live = local < rows
    n = block * rows + local
    x_rows = x + m[:, None] * sxm
    steps = tl.arange(0, BK).to(tl.int64)
    acc = tl.zeros((BN, BM), tl.float32)
    if FORM == "blockdiag":
        x_block = x_rows + block * DEPTH * sxk
        w_block = R + block * srb + local[:, None] * srn
        for k0 in range(0, DEPTH, BK):
            k = k0 + steps
            inside = (steps < (DEPTH - k0 if DEPTH % BK else BK))[None, :]
            x_tile = tl.load(x_block + k[None, :] * sxk, mask=(m < M)[:, None] & inside, other=0.0)
            w = tl.load(w_block + k[None, :] * srk, mask=live[:, None] & inside, other=0.0)
            acc = tl.dot(w, x_tile.T, acc, input_precision=PRECISION)
    if R1:
        r1 = tl.arange(0, R1).to(tl.int64)
        t1 = tl.zeros((BM, R1), tl.float32)
    if R2:
        r2 = R1 + tl.arange(0, R2).to(tl.int64)
        t2 = tl.zeros((BM, R2), tl.float32)
    if FORM != "blockdiag" or R1:
        if FORM != "blockdiag":
            SPAN: tl.constexpr = (K + BK - 1) // BK * BK
            s = tl.load(scale + n * ssn, mask=live, other=0.0).to(tl.float32)
        for k0 in range(0, K, BK):
            k = k0 + steps
            inside = (steps < (K - k0 if K % BK else BK))[None, :]
            x_tile = tl.load(x_rows + k[None, :] * sxk, mask=(m < M)[:, None] & inside, other=0.0)
            if R1:
                b = tl.load(B + r1[:, None] * sbr + k[None, :] * sbk, mask=(r1 < r)[:, None] & inside, other=0.0)
                t1 = tl.dot(x_tile, b.T, t1, input_precision=PRECISION)
            if R2:
                b = tl.load(B + r2[:, None] * sbr + k[None, :] * sbk, mask=(r2 < r)[:, None] & inside, other=0.0)
                t2 = tl.dot(x_tile, b.T, t2, input_precision=PRECISION)
            if FORM != "blockdiag":
                w = (load_codes(R, n, live, k0, srn, srk, FORM, K, BK) * s[:, None]).to(dtype)
                # The next scales are fetched a step ahead, 2 bytes a row cannot be copied asynchronously; the last
                # step fetches the first ones again.
                ahead = (k0 + BK) % SPAN // GROUP
                s = tl.load(scale + n * ssn + ahead * ssg, mask=live, other=0.0).to(tl.float32)
                acc = tl.dot(w, x_tile.T, acc, input_precision=PRECISION)
    if R1:
        t1 = within(t1, r, R1, EVEN)  # beyond the rank stands NaN where x holds Inf: Inf · 0
        acc = _expand(acc, t1, A, n, live, r1, r, san, sar, PRECISION)
    if R2:
        t2 = within(t2, r - R1, R2, EVEN)
        acc = _expand(acc, t2, A, n, live, r2, r, san, sar, PRECISION)
    for c0 in range(0, CHUNKS * CHUNK, CHUNK):
        c = c0 + tl.arange(0, CHUNK).to(tl.int64)
        part = tl.load(t + m[:, None] * r + c[None, :], mask=(m < M)[:, None] & (c < r)[None, :], other=0.0)
        acc = _expand(acc, part, A, n, live, c, r, san, sar, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + n * sb, mask=live, other=0.0).to(tl.float32)[:, None]
    tl.store(y + m[None, :] * N + n[:, None], acc.to(dtype), mask=(m < M)[None, :] & live[:, None])


def run_one_pass(x, B, A, R, scale, bias, form, group_size):
    """`A (B x) + R x + b` in one launch; the arguments and the result are those of the op."""
    return _run(x, B, A, R, scale, bias, form, group_size, fused=True)


def run_two_pass(x, B, A, R, scale, bias, form, group_size):
    """`T = x Bᵀ` in a launch of its own, the rest in a second one; the arguments and the result are those of the op."""
    return _run(x, B, A, R, scale, bias, form, group_size, fused=False)


def _run(
    x: Tensor, B: Tensor, A: Tensor, R: Tensor, scale: Tensor | None, bias: Tensor | None, form: str, group_size: int,
    fused: bool,
) -> Tensor:  # fmt: skip
    (r, K), N = B.shape, A.shape[0]
    rows = x.reshape(-1, K)  # a view, or a copy where no strides describe it
    M = rows.shape[0]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    target = target_of(x.device)
    shape = (M, K, N, r, form, group_size, x.dtype, target)
    config = (one_pass if fused else two_pass)(*shape)

    def launch(config: Config) -> None:
        T = None if fused else _shrink(rows, B, target)
        _launch(rows, B, A, R, scale, bias, T, y, form, group_size, target, config)

    with torch.cuda.device_of(x):
        known, options = sizes(M, K, N, summed(r, fused), form), partial(configs, *shape, fused)
        launch(tables.measure(KERNEL, options, known, x.dtype, target, launch) or config)
    return y


def _shrink(x: Tensor, B: Tensor, target: Target) -> Tensor:
    """`T = x Bᵀ` [M, r], rounded to x's dtype, by lowrank_linear_split's first launch."""
    (M, K), r = x.shape, B.shape[0]
    T = torch.empty((1, M, r), dtype=x.dtype, device=x.device)
    config = lowrank_linear_split.split(M, K, r, r, x.dtype, target)
    lowrank_linear_split.launch_shrink(x, B, T, replace(config, splits=1))
    return T[0]


def _launch(
    x: Tensor, B: Tensor, A: Tensor, R: Tensor, scale: Tensor | None, bias: Tensor | None, T: Tensor | None, y: Tensor,
    form: str, group_size: int, target: Target, config: Config,
) -> None:  # fmt: skip
    (M, K), N, r = x.shape, A.shape[0], B.shape[0]
    blocks = form == "blockdiag"
    R1, R2 = two_powers(r) if T is None else (0, 0)
    columns = chunk(x.element_size())
    _residual[(tiles(M, K, N, form, group_size, config),)](
        x, B, A, R, x if scale is None else scale, x if bias is None else bias, y if T is None else T, y, M, N, r,
        *x.stride(), *B.stride(), *A.stride(), *(R.stride() if blocks else (0, *R.stride())),
        *strides(scale, 2), *strides(bias, 1),
        K, group_size if blocks else min(group_size, K), stored(form, target), R1, R2, r == R1 + R2,
        0 if T is None else triton.cdiv(r, columns), columns, config.BM, config.BN, config.BK,
        bias is not None, precision(x.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def cases(target: Target) -> list[Case]:
    """Specialisations that must compile without spills, with bounds on their registers."""

    @where_taken
    def case(form: str, type_: str, M: int, r: int, fused: bool, sm_80: int, sm_90: int) -> Case:
        """A 768 x 768 layer with groups or blocks of 64 columns, as `_launch` makes it."""
        dtype = DTYPES[type_]
        config = (one_pass if fused else two_pass)(M, 768, 768, r, form, 64, dtype, target)
        types = dict.fromkeys(("x", "B", "A", "scale", "bias", "t", "y"), f"*{type_}")
        types["R"] = {"int8": "*i8", "blockdiag": f"*{type_}"}.get(form, "*u8")
        columns = chunk(dtype.itemsize)
        R1, R2 = two_powers(r) if fused else (0, 0)
        constants: dict[str, Any] = {
            "K": 768, "GROUP": 64, "FORM": stored(form, target), "CHUNK": columns,
            "CHUNKS": 0 if fused else triton.cdiv(r, columns), "R1": R1, "R2": R2,
            "EVEN": r == R1 + R2, "BM": config.BM, "BN": config.BN, "BK": config.BK,
            "HAS_BIAS": True, "PRECISION": precision(dtype),
            "sxk": 1, "sbk": 1, "sar": 1, "srk": 1, "ssg": 1, "sb": 1,
        }  # fmt: skip
        aligned = ("x", "B", "A", "R", "scale", "bias", "t", "y", "M", "N", "r", "sxm", "sbr", "san", "srb", "srn")
        integers = {name: "i32" for name in _residual.arg_names if name not in types and name not in constants}
        return Case(
            f"{KERNEL}.{'one' if fused else 'two'}_pass {form} {type_} M={M} r={r}",
            _residual,
            {**types, **integers},
            constants,
            config.num_warps,
            config.num_stages,
            {"sm_80": sm_80, "sm_90": sm_90},
            aligned,
            tensor_cores=type_ != "fp32",
            shared=shared_memory(config, summed(r, fused), form, dtype.itemsize, target),
        )

    return [
        *case("int8", "bf16", 12608, 32, True, sm_80=176, sm_90=182),
        *case("int8", "bf16", 12608, 64, True, sm_80=188, sm_90=212),
        *case("int8", "bf16", 12608, 128, True, sm_80=0, sm_90=244),  # not taken on sm_80
        *case("int4", "bf16", 12608, 32, True, sm_80=212, sm_90=184),
        *case("int4", "fp16", 12608, 48, True, sm_80=183, sm_90=192),
        *case("fp8", "bf16", 12608, 32, True, sm_80=178, sm_90=182),
        *case("blockdiag", "bf16", 12608, 32, True, sm_80=198, sm_90=150),
        *case("int8", "bf16", 16, 32, True, sm_80=136, sm_90=88),
        *case("int4", "bf16", 12608, 256, False, sm_80=176, sm_90=165),  # 140 with Triton 3.6 and 3.9
        *case("int8", "fp16", 12608, 192, False, sm_80=186, sm_90=136),
        *case("int8", "fp32", 12608, 64, True, sm_80=178, sm_90=116),
        *case("int4", "fp32", 12608, 192, False, sm_80=82, sm_90=82),
    ]
