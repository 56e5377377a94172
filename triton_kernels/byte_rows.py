"""Rows of floats to rows of bytes, after a LayerNorm or as they are: what kernels of bytes begin with.

    fp8   q = e4m3(y / scale), scale a power of two a row; y = x or LayerNorm(x); squares = Σ y² of the row
    int8  q = round(multiplier ⊙ y[wide] + shift) - 128, cut off at the ends of a byte

x [M, K] -> q [M, K], int8 [M, K + R] for R further columns. A program owns BM rows and holds them whole, so that x is
read once and a norm costs no pass of its own: `M K (size + 1)` bytes. Rows wider than 8192 are not taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import e4m3, scale_of
from .compilation import Case, where_taken
from .targets import Target, Unsupported, target_of
from .tiles import DTYPES, check_dtype, check_sizes

WIDEST = 8192
FP8 = ("sm_89", "sm_90", "sm_100", "sm_120", "interpreter")
"""Architectures that multiply e4m3."""


@dataclass(frozen=True)
class Config:
    """Rows of a program, and its warps."""

    BM: int
    num_warps: int


def config(K: int, dtype: torch.dtype, target: Target) -> Config:
    """About 4096 elements a program. Raises Unsupported for a dtype or a width that is not taken."""
    check_dtype(dtype, target)
    check_sizes(K=K)
    if K > WIDEST:
        raise Unsupported(f"K = {K}, a row is held whole and taken up to {WIDEST}")
    return Config(max(1, 4096 // triton.next_power_of_2(K)), 4)


def check_fp8(target: Target) -> None:
    """Raises Unsupported where e4m3 is not multiplied."""
    if target.name not in FP8:
        raise Unsupported(f"{target.name} does not multiply e4m3, {', '.join(FP8[:-1])} do")


@triton.jit(do_not_specialize=["M"])
def _rows(x, gamma, beta, eps, multiplier, shift, wide, q, scale, squares, M, sxm, sxk, K: tl.constexpr,
          R: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """BM rows. BK and BR: powers of two that hold K and the R further columns; without multipliers q is in e4m3."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    rows, inside = m < M, (m < M)[:, None] & (k < K)[None, :]
    y = tl.load(x + m[:, None] * sxm + k[None, :].to(tl.int64) * sxk, mask=inside, other=0.0).to(tl.float32)
    if gamma is not None:
        mean = tl.sum(y, 1) / K
        y = tl.where(inside, y - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(y * y, 1) / K + eps)
        g = tl.load(gamma + k, mask=k < K, other=0.0).to(tl.float32)
        b = tl.load(beta + k, mask=k < K, other=0.0).to(tl.float32)
        y = y * rstd[:, None] * g[None, :] + b[None, :]
    if multiplier is not None:
        width: tl.constexpr = K + R
        by, more = tl.load(multiplier + k, mask=k < K, other=0.0), tl.load(shift + k, mask=k < K, other=0.0)
        tl.store(q + m[:, None] * width + k[None, :], byte(y, by[None, :], more[None, :]), mask=inside)
        if R > 0:  # a channel is read again, and its norm made again: there are few of them
            r = tl.arange(0, BR)
            j = tl.load(wide + r, mask=r < R, other=0)
            further = rows[:, None] & (r < R)[None, :]
            y = tl.load(x + m[:, None] * sxm + j[None, :].to(tl.int64) * sxk, mask=further, other=0.0).to(tl.float32)
            if gamma is not None:
                g = tl.load(gamma + j, mask=r < R, other=0.0).to(tl.float32)
                b = tl.load(beta + j, mask=r < R, other=0.0).to(tl.float32)
                y = (y - mean[:, None]) * rstd[:, None] * g[None, :] + b[None, :]
            by = tl.load(multiplier + K + r, mask=r < R, other=0.0)
            more = tl.load(shift + K + r, mask=r < R, other=0.0)
            tl.store(q + m[:, None] * width + K + r[None, :], byte(y, by[None, :], more[None, :]), mask=further)
    else:
        total = tl.sum(y * y, 1)
        s, inverse = scale_of(tl.max(tl.abs(y), 1) + 0.0 * total)  # a maximum passes over NaN
        tl.store(q + m[:, None] * K + k[None, :], e4m3(y * inverse[:, None], BY_HAND), mask=inside)
        tl.store(scale + m, s, mask=rows)
        tl.store(squares + m, total, mask=rows)


@triton.jit
def byte(y, multiplier, shift):
    """`round(multiplier y + shift)` from 0 to 255, less 128: ties to even, NaN is 0."""
    v = tl.minimum(tl.maximum(y * multiplier + shift, 0.0), 255.0)
    return ((v + 12582912.0) - 12582912.0 - 128.0).to(tl.int8)  # 1.5 2^23: the sum has no room for fractions


def fp8(x: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """q [M, K] in e4m3, its scale [M], and the sum of squares [M, 1] of x [M, K]. Raises Unsupported."""
    target = target_of(x.device)
    check_fp8(target)
    (M, K), device = x.shape, x.device
    q = torch.empty((M, K), dtype=torch.float8_e4m3fn, device=device)
    scale, squares = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((M,), (M, 1)))
    _launch(x, norm, eps, None, None, None, q, scale, squares, target)
    return q, scale, squares


def int8(
    x: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float, multiplier: Tensor, shift: Tensor, wide: Tensor | None
) -> Tensor:
    """q [M, K + R] of x [M, K]. Raises Unsupported."""
    q = torch.empty((len(x), len(multiplier)), dtype=torch.int8, device=x.device)
    _launch(x, norm, eps, multiplier.contiguous(), shift.contiguous(), wide, q, None, None, target_of(x.device))
    return q


def _launch(
    x: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float, multiplier: Tensor | None, shift: Tensor | None,
    wide: Tensor | None, q: Tensor, scale: Tensor | None, squares: Tensor | None, target: Target,
) -> None:  # fmt: skip
    M, K = x.shape
    chosen = config(K, x.dtype, target)
    gamma, beta = (None, None) if norm is None else (part.contiguous() for part in norm)
    R = q.shape[1] - K
    _rows[(triton.cdiv(M, chosen.BM),)](
        x, gamma, beta, eps, multiplier, shift, None if wide is None else wide.contiguous(), q, scale, squares, M,
        *x.stride(), K=K, R=R, BK=triton.next_power_of_2(K), BR=triton.next_power_of_2(max(R, 1)), BM=chosen.BM,
        BY_HAND=target.backend == "interpreter", num_warps=chosen.num_warps,
    )  # fmt: skip


def cases(target: Target) -> list[Case]:
    """What is compiled without a GPU: ViT-B's rows, with a norm and without."""

    @where_taken
    def case(form: str, type_: str, K: int, norm: bool, registers: int, R: int = 0) -> Case:
        chosen = config(K, DTYPES[type_], target)
        absent: dict[str, None] = {}
        pointers = {"x": f"*{type_}", "gamma": f"*{type_}", "beta": f"*{type_}", "multiplier": "*fp32"}
        pointers |= {"shift": "*fp32", "wide": "*i32", "q": "*i8", "scale": "*fp32", "squares": "*fp32"}
        if form == "fp8":
            check_fp8(target)
            pointers["q"] = "*fp8e4nv"
            absent |= dict.fromkeys(["multiplier", "shift", "wide"])
        else:
            absent |= dict.fromkeys(["scale", "squares", *["wide"] * (R == 0)])
        if not norm:
            absent |= dict.fromkeys(["gamma", "beta"])
        sizes = {"K": K, "R": R, "BK": triton.next_power_of_2(K), "BR": triton.next_power_of_2(max(R, 1))}
        return Case(
            f"byte_rows {form} {type_} K={K}{' after a norm' * norm}{f' + {R}' if R else ''}",
            _rows,
            {name: kind for name, kind in pointers.items() if name not in absent}
            | {"eps": "fp32", "M": "i32", "sxm": "i32"},
            {**absent, "sxk": 1, **sizes, "BM": chosen.BM, "BY_HAND": False},
            chosen.num_warps,
            1,
            {target.name: registers},
            (*(name for name in pointers if name not in absent), "sxm"),
            tensor_cores=False,
        )

    return [
        *case("fp8", "bf16", 768, True, 80),
        *case("fp8", "bf16", 768, False, 80),
        *case("fp8", "fp16", 3072, False, 80),
        *case("int8", "bf16", 768, True, 96),
        *case("int8", "bf16", 768, True, 96, 12),
    ]
