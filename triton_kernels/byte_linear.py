"""One linear of bytes, any rank and width: `p = scale ⊙ (W q) + b`, then an activation, then floats or bytes again.

    q [M, K], W [N, K]   both in e4m3, sums in fp32, or both in int8, exact sums in int32
    scale, b [N]         fp32: the step of row n of W, and a bias
    y = act(p) + residual in floats, or act(p) as the bytes that the next linear multiplies:

    fp8   rows have scales, powers of two: p = row_scale (scale ⊙ (W q)) + b. The scale of the next rows is known before
          the product, as |act(p)| <= |p| <= ‖row‖ reach₀ + reach₁, with reach = (largest ‖row of W‖, largest |b|). So
          tiles of one row need not hear of each other, and the next product takes the scale out of its sum.
    int8  columns have steps: q' = round(multiplier ⊙ act(p) + shift), which calibration found.

A program owns one tile of y. Floor: `2 M N K` operations, `M K + N K + M N` bytes. docs/kernels/eight_bits.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables
from .activations import activate
from .byte_rows import byte, check_fp8
from .codes import e4m3, scale_of
from .compilation import Case, where_taken
from .targets import Target, target_of
from .tiles import check_dtype, check_sizes, fitting

KERNEL = "byte_linear"
FP8 = torch.float8_e4m3fn
SMALLER = (("num_stages", 3), ("num_stages", 2), ("BK", 64), ("BN", 64), ("BM", 64))
"""How tiles are cut down where shared memory is short."""


@dataclass(frozen=True)
class Config:
    """Rows, columns and depth of a tile, warps of a program, stages of its loop over K."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


class Rows(NamedTuple):
    """Bytes [M, K]; of e4m3 also the scale of each row [M] and parts of its sum of squares [M, tiles]."""

    q: Tensor
    scale: Tensor | None = None
    squares: Tensor | None = None


def config(
    M: int | None, K: int, N: int, dtype: torch.dtype, form: torch.dtype, target: Target, residual: bool = False
) -> Config:
    """The tiles of a shape; dtype is that of the floats, form that of the bytes; M is None while rows are not known.

    Raises Unsupported for a dtype or size that is not taken and where no tiles fit the shared memory.
    """
    if form is FP8:
        check_fp8(target)
    check_dtype(dtype, target)
    check_sizes(K=K, N=N)
    row = tables.nearest(KERNEL, target, form, M=M, K=K, N=N)
    wanted = _tiles(M or 12608, K, N, residual, target) if row is None else Config(**row)
    return fitting(wanted, SMALLER, shared_memory, target)


def _tiles(M: int, K: int, N: int, residual: bool, target: Target) -> Config:
    """Two programs a processor, so that one issues activations while the other multiplies; small tiles for few rows.

    Where K is long, what tiles read from L2 takes longer than either: there one wide tile a processor, whose registers
    have no room for a residual.
    """
    tiles_of = lambda BM, BN: triton.cdiv(M, BM) * triton.cdiv(N, BN)  # noqa: E731
    if not target.hopper and target.backend != "interpreter":
        return Config(64, 128, 64, 4, 3)
    if tiles_of(128, 128) < target.sms:
        return Config(64, 64, 128, 4, 4)
    covers = 2 * triton.cdiv(N, 256) == triton.cdiv(N, 128)  # wide tiles end where narrow ones do
    if K > 512 and covers and target.hopper and not residual:
        return Config(128, 256, 128, 8, 4)
    return Config(128, 128, 128, 8, 3)


def configs(target: Target) -> list[Config]:
    """What VITLR_AUTOTUNE measures: tiles that fit."""
    sizes = ((64, 64, 4), (64, 128, 4), (128, 128, 8), (64, 256, 4), (128, 256, 8))
    options = [Config(*s[:2], BK, s[2], stages) for s, BK, stages in itertools.product(sizes, (64, 128), (2, 3, 4))]
    return [option for option in options if shared_memory(option) <= target.shared_memory]


def tiles(M: int, N: int, config: Config) -> int:
    """Programs launched."""
    return triton.cdiv(M, config.BM) * triton.cdiv(N, config.BN)


def shared_memory(config: Config) -> int:
    """Bytes of shared memory, at least what the compilers take: the loop's tiles, or y on its way to its columns."""
    BM, BN = config.BM, config.BN
    return max(config.num_stages * config.BK * (BM + BN), 4 * BM * BN) + 1024


@triton.jit(do_not_specialize=["M"])
def _linear(q, row_scale, squares, W, scale, bias, reach, multiplier, shift, residual, y, y_scale, y_squares, M, srm,
            K: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            BK: tl.constexpr, STAGES: tl.constexpr, ACT: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """One tile. Bytes come out where `reach` (e4m3) or `multiplier` (int8) says how; PARTS: tiles of `squares`."""
    across: tl.constexpr = (N + BN - 1) // BN  # tiles of y side by side are neighbours: they read the same rows of q
    tile = tl.program_id(0) % across
    m0, i = (tl.program_id(0) // across).to(tl.int64) * BM, tl.arange(0, BM)  # offsets within a tile stay in int32
    n0, j = (tile * BN).to(tl.int64), tl.arange(0, BN)
    k = tl.arange(0, BK)
    rows, columns = i < M - m0, j < N - n0
    q_tile = q + m0 * K + (i[:, None] * K + k[None, :])  # [BM, BK]
    W_tile = W + n0 * K + (j[None, :] * K + k[:, None])  # [BK, BN]
    floats: tl.constexpr = row_scale is not None
    acc = tl.zeros((BM, BN), tl.float32 if floats else tl.int32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        inside = k < (K - k0 if K % BK else BK)
        q_block = tl.load(q_tile, mask=rows[:, None] & inside[None, :], other=0.0 if floats else 0)
        W_block = tl.load(W_tile, mask=inside[:, None] & columns[None, :], other=0.0 if floats else 0)
        acc = tl.dot(q_block, W_block, acc, out_dtype=tl.float32 if floats else tl.int32)
        q_tile += BK
        W_tile += BK
    # Beyond N stand scale and bias of 0, so that activations of 0 add nothing to a sum of squares that bounds.
    by = tl.load(scale + n0 + j, mask=columns, other=0.0)
    p = acc.to(tl.float32)
    if floats:
        p *= tl.load(row_scale + m0 + i, mask=rows, other=0.0)[:, None]
    p *= by[None, :]
    if bias is not None:
        p += tl.load(bias + n0 + j, mask=columns, other=0.0)[None, :]
    p = activate(p, ACT, tl.float8e4nv if reach is not None else (tl.float16 if multiplier is not None else
                 y.dtype.element_ty))  # fmt: skip
    y += m0 * N + n0
    out = i[:, None] * N + j[None, :]
    inside = rows[:, None] & columns[None, :]
    if reach is not None:
        total = tl.zeros((BM,), tl.float32)
        for part in tl.static_range(PARTS):
            total += tl.load(squares + m0 * PARTS + i * PARTS + part, mask=rows, other=0.0)
        limit = tl.sqrt(total) * tl.load(reach) + tl.load(reach + 1)
        if ACT == "sigmoid":
            limit = 1.0 + 0.0 * total
        s, inverse = scale_of(limit)
        tl.store(y + out, e4m3(p * inverse[:, None], BY_HAND), mask=inside)
        tl.store(y_squares + m0 * across + tile + i * across, tl.sum(p * p, 1), mask=rows)
        if tile == 0:
            tl.store(y_scale + m0 + i, s, mask=rows)
    elif multiplier is not None:
        of = tl.load(multiplier + n0 + j, mask=columns, other=0.0)
        to = tl.load(shift + n0 + j, mask=columns, other=0.0)
        tl.store(y + out, byte(p, of[None, :], to[None, :]), mask=inside)
    else:
        if residual is not None:
            at = i[:, None] * srm + j[None, :]
            p += tl.load(residual + m0 * srm + n0 + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + out, p.to(y.dtype.element_ty), mask=inside)


def to_floats(
    rows: Rows, W: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None, act: str, y: Tensor
) -> None:
    """`y = act(p) + residual`, y [M, N] contiguous. Raises Unsupported."""
    target = target_of(y.device)

    def launch(config: Config) -> None:
        _launch(rows, W, scale, bias, act, Rows(y), config, target, residual=residual)

    launch(_chosen(rows.q, W, y.dtype, target, launch, residual is not None))


def to_fp8(
    rows: Rows, W: Tensor, scale: Tensor, bias: Tensor | None, reach: Tensor, act: str, dtype: torch.dtype
) -> Rows:
    """act(p) [M, N] in e4m3 with scales. Raises Unsupported. `dtype`: of the floats before and after."""
    M, N, target, device = len(rows.q), len(W), target_of(W.device), W.device
    q = torch.empty((M, N), dtype=FP8, device=device)
    row_scale = torch.empty((M,), dtype=torch.float32, device=device)
    found: list[Rows] = []

    def launch(config: Config) -> None:
        parts = torch.empty((M, triton.cdiv(N, config.BN)), dtype=torch.float32, device=device)
        found[:] = [Rows(q, row_scale, parts)]
        _launch(rows, W, scale, bias, act, found[0], config, target, reach=reach)

    launch(_chosen(rows.q, W, dtype, target, launch))
    return found[0]


def to_int8(
    rows: Rows, W: Tensor, scale: Tensor, bias: Tensor | None, multiplier: Tensor, shift: Tensor, act: str,
    dtype: torch.dtype,
) -> Rows:  # fmt: skip
    """`round(multiplier ⊙ act(p) + shift) - 128` [M, N], cut off at the ends of a byte. Raises Unsupported."""
    target = target_of(W.device)
    q = torch.empty((len(rows.q), len(W)), dtype=torch.int8, device=W.device)

    def launch(config: Config) -> None:
        _launch(rows, W, scale, bias, act, Rows(q), config, target, multiplier=multiplier, shift=shift)

    launch(_chosen(rows.q, W, dtype, target, launch))
    return Rows(q)


def _chosen(
    q: Tensor, W: Tensor, dtype: torch.dtype, target: Target, launch: Callable[[Config], None], residual: bool = False
) -> Config:
    (M, K), N = q.shape, len(W)
    own = config(M, K, N, dtype, W.dtype, target, residual)
    return tables.measure(KERNEL, partial(configs, target), {"M": M, "K": K, "N": N}, W.dtype, target, launch) or own


def _launch(
    rows: Rows, W: Tensor, scale: Tensor, bias: Tensor | None, act: str, y: Rows, config: Config, target: Target,
    *, reach: Tensor | None = None, multiplier: Tensor | None = None, shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:  # fmt: skip
    (M, K), N = rows.q.shape, len(W)
    parts = 1 if rows.squares is None else rows.squares.shape[1]
    _linear[(tiles(M, N, config),)](
        rows.q, rows.scale, rows.squares, W, scale, bias, reach, multiplier, shift, residual, *y, M,
        0 if residual is None else residual.stride(0),
        **_constants(K, N, parts, act, config), BY_HAND=target.backend == "interpreter", num_warps=config.num_warps,
    )  # fmt: skip


def _constants(K: int, N: int, parts: int, act: str, config: Config) -> dict[str, Any]:
    return {
        "K": K, "N": N, "PARTS": parts, "BM": config.BM, "BN": config.BN, "BK": config.BK,
        "STAGES": config.num_stages, "ACT": act,
    }  # fmt: skip


def cases(target: Target) -> list[Case]:
    """What is compiled without a GPU: both halves of ViT-B's MLP at real ranks and widths, in and out of bytes."""

    @where_taken
    def case(form: str, M: int, K: int, N: int, act: str, out: str, sm_80: int, sm_90: int) -> Case:
        bytes_, residual = FP8 if form == "fp8" else torch.int8, out == "residual"
        chosen = config(M, K, N, torch.bfloat16, bytes_, target, residual)
        byte_, fp8 = ("*fp8e4nv", True) if form == "fp8" else ("*i8", False)
        pointers = {"q": byte_, "W": byte_, "scale": "*fp32", "bias": "*fp32"}
        if fp8:
            pointers |= {"row_scale": "*fp32", "squares": "*fp32"}
        if out == "bytes":
            pointers["y"] = byte_
            names = ("reach", "y_scale", "y_squares") if fp8 else ("multiplier", "shift")
            pointers |= dict.fromkeys(names, "*fp32")
        else:
            pointers |= dict.fromkeys(("y", *["residual"] * (out == "residual")), "*bf16")
        absent = [name for name in _POINTERS if name not in pointers]
        return Case(
            f"byte_linear {form} {K} to {N}, M={M}, {act}, {out}",
            _linear,
            {**pointers, "M": "i32", "srm": "i32"},
            {**dict.fromkeys(absent), **_constants(K, N, 6 if fp8 else 1, act, chosen), "BY_HAND": False},
            chosen.num_warps,
            chosen.num_stages,
            {"sm_80": sm_80, "sm_90": sm_90},
            (*pointers, "srm"),
            shared=shared_memory(chosen),
        )

    return [
        case_
        for form in ("fp8", "int8")
        for case_ in (
            *case(form, 12608, 224, 3072, "gelu", "bytes", 255, 128),
            *case(form, 12608, 3072, 224, "none", "bytes", 255, 255),
            *case(form, 12608, 768, 1920, "gelu", "bytes", 255, 255),
            *case(form, 12608, 1920, 768, "none", "residual", 255, 152),
            *case(form, 12608, 768, 2304, "none", "floats", 255, 255),
            *case(form, 197, 768, 3072, "silu", "bytes", 255, 255),
            *case(form, 12608, 100, 90, "gelu", "bytes", 255, 255),
        )
    ]


_POINTERS = (
    "q", "row_scale", "squares", "W", "scale", "bias", "reach", "multiplier", "shift", "residual", "y", "y_scale",
    "y_squares",
)  # fmt: skip
