"""`y = A₂ (B₂ (act(g) ∘ v)) + b₂ + residual`, gate `g = A_g (B_g x) + b_g`, value `v = A_v (B_v x) + b_v`, in one pass.

The gated MLP by the design of lowrank_mlp: a program owns BM rows, computes `T_g = B_g x` and `T_v = B_v x` once (one T
where gate and value share B, as the two halves of a packed fc1 do), walks over the hidden width in tiles of BD with

    H = act(T_g A_gᵀ + b_g) ∘ (T_v A_vᵀ + b_v) [BM, BD],    S += H B₂ᵀ [BM, r₂],

and then over N. Neither gate nor value nor their product [M, D] is stored. Two tiles of fp32 products are alive at
once, so BD is 64 or 32. A dense gate and value (A None, B [D, K]) take a loop over K for every tile; one dense and one
low-rank is not taken, nor is a dense fc2. Registers and what was tried: docs/kernels/lowrank_mlp.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables
from .activations import activate
from .compilation import Case, where_taken
from .lowrank_mlp_config import CLASSES, LARGEST_RANK, SMALLER, block_rows, tiles
from .row_blocks import accumulate, addressable, both, dense, expand, project, row, shrink, strides, through_memory
from .targets import Target, Unsupported, target_of
from .tiles import DTYPES, check_dtype, check_sizes, fitting, precision, two_powers

KERNEL = "lowrank_glu"


@dataclass(frozen=True)
class Config:
    """Rows, hidden columns, depth of K and output columns of the tiles; warps; stages; `staged` as in lowrank_mlp."""

    BM: int
    BD: int
    BK: int
    BN: int
    num_warps: int
    num_stages: int
    staged: int = 0


def row_block(
    M: int | None,
    K: int,
    D: int,
    N: int,
    rg: int | None,
    rv: int | None,
    r2: int | None,
    shared: bool,
    dtype: torch.dtype,
    target: Target,
) -> Config:
    """The tiles of a shape; M is None where rows are not known, rg and rv where gate and value are dense.

    Raises Unsupported for a dtype, rank or size that is not taken and where no tiles fit the shared memory.
    """
    if r2 is None:
        raise Unsupported(f"fc2 is dense: its sums would be {N} wide and are kept in registers, up to {LARGEST_RANK}")
    if (rg is None) != (rv is None):
        raise Unsupported("one of gate and value is dense and the other is not, taken are two of a kind")
    check_dtype(dtype, target)
    check_sizes(K=K, D=D, N=N, rg=K if rg is None else rg, rv=K if rv is None else rv, r2=r2)
    for name, r in (("rg", rg), ("rv", rv), ("r2", r2)):
        if r is not None and r > LARGEST_RANK:
            raise Unsupported(f"{name}={r}, ranks are held in registers and taken up to {LARGEST_RANK}")
    BM = block_rows(M, target.sms)
    wanted = _tiles(BM, rg, rv, r2, shared, dtype)
    found = tables.nearest(KERNEL, target, dtype, M=M, K=K, D=D, N=N, **_class(BM, rg, rv, r2, shared))
    if found is not None:
        wanted = Config(**found)
    if _ragged(wanted, K, D, N, rg, rv, r2):  # masks take registers
        if target.name != "sm_90":
            wanted = replace(wanted, BM=64, num_warps=8)
        elif wanted.BM == 64 and max(rg or 0, rv or 0, r2) > 128:
            wanted = replace(wanted, BD=32, num_warps=8)
    return fitting(wanted, SMALLER, lambda config: shared_memory(config, rg, rv, r2, shared, dtype), target)


def shared_memory(config: Config, rg: int | None, rv: int | None, r2: int, shared: bool, dtype: torch.dtype) -> int:
    """Bytes of shared memory, at least what the compilers take: the largest of the loops, which share it."""
    c, size, R2 = config, dtype.itemsize, sum(two_powers(r2))
    Rg, Rv = (0 if r is None else sum(two_powers(r)) for r in (rg, rv))
    held = (Rg if shared else Rg + Rv) * c.BM * (1 if c.staged or size == 4 else 0)
    if rg is None:
        first, hidden = c.num_stages * c.BK * (c.BM + c.BD), c.BD * (R2 + 2 * c.BM)
        hidden += first
    else:
        first, hidden = c.num_stages * c.BK * (c.BM + max(Rg, Rv)) + held, c.num_stages * c.BD * (Rg + Rv + R2) + held
    last = c.num_stages * c.BN * (R2 + c.BM)
    return max(first, hidden, last) * size + 16 * 1024


def _class(BM: int, rg: int | None, rv: int | None, r2: int, shared: bool) -> dict[str, int]:
    """What the table's rows are keyed by: rows of the block, class of the largest rank, 0 for dense ones."""
    r = next(size for size in CLASSES if max(rg or 0, rv or 0, r2) <= size)
    return {"BM": BM, "r": r, "rg": rg or 0, "rv": rv or 0, "r2": r2, "shared": 1 + shared}


def _tiles(BM: int, rg: int | None, rv: int | None, r2: int, shared: bool, dtype: torch.dtype) -> Config:
    """What is tried first where no table names the target, and in fp32."""
    r = max(rg or 0, rv or 0, r2)
    if dtype is torch.float32:
        return Config(32, 32, 32 if r <= 64 else 16, 32, 8, 2)
    return Config(BM, 32, 32, 32, BM // 16, 2, staged=int(r > 64))


@triton.jit(do_not_specialize=["M"])
def _row_block(x, Bg, Ag, bg, Bv, Av, bv, B2, A2, b2, residual, y, Tg, Tv, M, rg, rv, r2,
               x_sm, x_sk, Bg_sr, Bg_sk, Ag_sd, Ag_sr, bg_s, Bv_sr, Bv_sk, Av_sd, Av_sr, bv_s,
               B2_sr, B2_sd, A2_sn, A2_sr, b2_s, res_sm, res_sn, K: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
               BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
               RGA: tl.constexpr, RGB: tl.constexpr, RVA: tl.constexpr, RVB: tl.constexpr,
               R2A: tl.constexpr, R2B: tl.constexpr, SHARED: tl.constexpr,
               ACT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """BM rows; SHARED: gate and value have one B. Tg, Tv: memory for T where it is staged."""
    dtype = x.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BM
    rows = M - m
    x += m * x_sm
    if Ag is not None:
        ga, gb = shrink(x, rows, x_sm, x_sk, Bg, Bg_sr, Bg_sk, rg, K, BM, BK, RGA, RGB, EVEN, PRECISION)
        if Tg is not None:
            Tg += m * rg
            ga = through_memory(ga, Tg, rg, rg, rows, RGA, BM)
            if RGB > 0:
                gb = through_memory(gb, Tg + RGA, rg, rg - RGA, rows, RGB, BM)
        va, vb = ga, gb
        if not SHARED:
            va, vb = shrink(x, rows, x_sm, x_sk, Bv, Bv_sr, Bv_sk, rv, K, BM, BK, RVA, RVB, EVEN, PRECISION)
            if Tv is not None:
                Tv += m * rv
                va = through_memory(va, Tv, rv, rv, rows, RVA, BM)
                if RVB > 0:
                    vb = through_memory(vb, Tv + RVA, rv, rv - RVA, rows, RVB, BM)
    sa = tl.zeros((BM, R2A), tl.float32)
    sb = sa
    if R2B > 0:
        sb = tl.zeros((BM, R2B), tl.float32)
    for d in range(0, D, BD):
        if Ag is not None:
            g = project(ga, gb, Ag, Ag_sd, Ag_sr, D - d, rg, BD, RGA, RGB, EVEN, PRECISION)
            Ag += tl.cast(BD, tl.int64) * Ag_sd
        else:
            g = dense(x, rows, x_sm, x_sk, Bg, Bg_sr, Bg_sk, D - d, K, BM, BD, BK, EVEN, PRECISION)
            Bg += tl.cast(BD, tl.int64) * Bg_sr
        if bg is not None:
            g += row(bg + tl.cast(d, tl.int64) * bg_s, bg_s, D - d, BD, not EVEN)
        h = activate(g, ACT, dtype).to(dtype).to(tl.float32)  # rounded as torch rounds it before the product
        if Ag is not None:
            v = project(va, vb, Av, Av_sd, Av_sr, D - d, rv, BD, RVA, RVB, EVEN, PRECISION)
            Av += tl.cast(BD, tl.int64) * Av_sd
        else:
            v = dense(x, rows, x_sm, x_sk, Bv, Bv_sr, Bv_sk, D - d, K, BM, BD, BK, EVEN, PRECISION)
            Bv += tl.cast(BD, tl.int64) * Bv_sr
        if bv is not None:
            v += row(bv + tl.cast(d, tl.int64) * bv_s, bv_s, D - d, BD, not EVEN)
        h *= v
        if not EVEN:
            h = tl.where(tl.arange(0, BD)[None, :] < D - d, h, 0.0)
        sa, sb = accumulate(sa, sb, h.to(dtype), B2, B2_sr, B2_sd, D - d, r2, BD, R2A, R2B, EVEN, PRECISION)
        B2 += tl.cast(BD, tl.int64) * B2_sd
    sa, sb = both(sa, sb, r2, R2A, R2B, EVEN, dtype)
    if residual is not None:
        residual += m * res_sm
    expand(sa, sb, rows, A2, A2_sn, A2_sr, r2, b2, b2_s, residual, res_sm, res_sn, y + m * N,
           N, BM, BN, R2A, R2B, EVEN, PRECISION)  # fmt: skip


def run(
    x: Tensor,
    Bg: Tensor,
    Ag: Tensor | None,
    bg: Tensor | None,
    Bv: Tensor,
    Av: Tensor | None,
    bv: Tensor | None,
    B2: Tensor,
    A2: Tensor | None,
    b2: Tensor | None,
    residual: Tensor | None,
    act: str,
) -> Tensor:
    """y [..., N] of x [..., K], one launch. Raises Unsupported.

    Any strides are taken; x or a residual whose leading dimensions have no common stride is copied once.
    """
    K, M, D = x.shape[-1], math.prod(x.shape[:-1]), B2.shape[1]
    N = B2.shape[0] if A2 is None else A2.shape[0]
    rg, rv, r2 = (None if A is None else B.shape[0] for B, A in ((Bg, Ag), (Bv, Av), (B2, A2)))
    shared = rg is not None and same(Bg, Bv)
    target = target_of(x.device)
    config = row_block(M, K, D, N, rg, rv, r2, shared, x.dtype, target)
    assert r2 is not None and A2 is not None
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if M == 0:
        return y
    x, residual = addressable(x.reshape(M, K)), None if residual is None else addressable(residual.reshape(M, N))
    Bg, Bv, B2, A2 = addressable(Bg), addressable(Bv), addressable(B2), addressable(A2)
    Ag, Av = (None if A is None else addressable(A) for A in (Ag, Av))

    def launch(config: Config) -> None:
        Tg = torch.empty((M, rg), dtype=x.dtype, device=x.device) if config.staged and rg else None
        Tv = torch.empty((M, rv), dtype=x.dtype, device=x.device) if config.staged and rv and not shared else None
        _row_block[(tiles(M, config),)](
            x, Bg, Ag, bg, Bv, Av, bv, B2, A2, b2, residual, y, Tg, Tv, M, rg or 0, rv or 0, r2,
            *x.stride(), *Bg.stride(), *strides(Ag, 2), *strides(bg, 1), *Bv.stride(), *strides(Av, 2), *strides(bv, 1),
            *B2.stride(), *A2.stride(), *strides(b2, 1), *strides(residual, 2),
            **_constants(config, K, D, N, rg, rv, r2, shared, act, x.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        sizes = {"M": M, "K": K, "D": D, "N": N, **_class(block_rows(M, target.sms), rg, rv, r2, shared)}

        options = partial(configs, rg, rv, r2, shared, x.dtype, target)
        launch(tables.measure(KERNEL, options, sizes, x.dtype, target, launch) or config)
    return y


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one memory seen in one way."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _ragged(config: Config, K: int, D: int, N: int, rg: int | None, rv: int | None, r2: int) -> bool:
    """Whether something else than rows has to be masked."""
    ranks = all(r == sum(two_powers(r)) for r in (rg or r2, rv or r2, r2))
    return not ranks or bool(K % config.BK or D % config.BD or N % config.BN)


def _constants(
    config: Config, K: int, D: int, N: int, rg: int | None, rv: int | None, r2: int, shared: bool, act: str,
    dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    parts = [(0, 0) if r is None else two_powers(r) for r in (rg, rv, r2)]
    even = not _ragged(config, K, D, N, rg, rv, r2)
    return {
        "K": K, "D": D, "N": N, "BM": config.BM, "BD": config.BD, "BK": config.BK, "BN": config.BN,
        "RGA": parts[0][0], "RGB": parts[0][1], "RVA": parts[1][0], "RVB": parts[1][1],
        "R2A": parts[2][0], "R2B": parts[2][1], "SHARED": shared,
        "ACT": act, "EVEN": even, "PRECISION": precision(dtype),
    }  # fmt: skip


def configs(rg: int | None, rv: int | None, r2: int, shared: bool, dtype: torch.dtype, target: Target) -> list[Config]:
    """What VITLR_AUTOTUNE measures: tiles that fit, smaller ones where registers are short; in fp32 nothing."""
    if dtype is torch.float32:
        return []
    staged = int(max(rg or 0, rv or 0, r2) > 64)
    options = [
        Config(BM, BD, BK, BN, BM // 16, stages, staged)
        for BM in (128, 64)
        for BD, BK, BN in ((64, 64, 64), (32, 64, 64), (32, 32, 32))
        for stages in (3, 2)
    ]
    return [c for c in options if shared_memory(c, rg, rv, r2, shared, dtype) <= target.shared_memory]


def cases(target: Target) -> list[Case]:
    """What is compiled without a GPU: the packed SwiGLU of DINOv2 ViT-g, the split one of EVA-02 ViT-B."""

    @where_taken
    def case(
        type_: str, rg: int | None, rv: int | None, r2: int, act: str, K: int = 1536, D: int = 4096,
        shared: bool = True, sm_80: int = 255, sm_90: int = 255,
    ) -> Case:  # fmt: skip
        dtype = DTYPES[type_]
        config = row_block(None, K, D, K, rg, rv, r2, shared, dtype, target)
        constants = _constants(config, K, D, K, rg, rv, r2, shared, act, dtype)
        pointers = ["x", "Bg", "bg", "Bv", "bv", "B2", "A2", "b2", "residual", "y"]
        sizes = ["rg", "rv", "r2", "x_sm", "Bg_sr", "Ag_sd", "Bv_sr", "Av_sd", "B2_sr", "A2_sn", "res_sm"]
        there = {"Ag": rg, "Av": rv, "Tg": config.staged and rg, "Tv": config.staged and rv and not shared}
        pointers += [name for name, value in there.items() if value]
        constants |= {name: None for name, value in there.items() if not value}
        ones = ["x_sk", "Bg_sk", "Ag_sr", "bg_s", "Bv_sk", "Av_sr", "bv_s", "B2_sd", "A2_sr", "b2_s", "res_sn"]
        return Case(
            f"lowrank_glu.row_block {type_} rg={rg} rv={rv} r2={r2} D={D} {act}{' shared' * shared}",
            _row_block,
            {**dict.fromkeys(pointers, f"*{type_}"), **dict.fromkeys([*sizes, "M"], "i32")},
            {**constants, **dict.fromkeys(ones, 1)},
            config.num_warps,
            config.num_stages,
            {"sm_80": sm_80, "sm_90": sm_90},
            (*pointers, *sizes),
            tensor_cores=type_ != "fp32",
            shared=shared_memory(config, rg, rv, r2, shared, dtype),
        )

    return [
        *case("bf16", 64, 64, 64, "silu", sm_80=132, sm_90=174),
        *case("bf16", 128, 128, 128, "silu", sm_80=196, sm_90=219),
        *case("bf16", 192, 192, 192, "silu", sm_80=255, sm_90=208),
        *case("bf16", 256, 256, 256, "silu", sm_80=171, sm_90=239),
        *case("bf16", 128, 128, 128, "silu", K=768, D=2048, shared=False, sm_80=214, sm_90=219),
        *case("fp16", 256, 256, 256, "silu", K=768, D=2048, shared=False, sm_80=132, sm_90=199),
        *case("fp16", 128, 96, 128, "gelu", K=768, D=2730, shared=False, sm_80=214, sm_90=248),
        *case("bf16", None, None, 128, "silu", shared=False, sm_80=224, sm_90=184),
        *case("fp32", 64, 64, 64, "silu", sm_80=84, sm_90=78),
    ]
