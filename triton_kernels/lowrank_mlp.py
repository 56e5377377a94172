"""`y = A₂ (B₂ act(A₁ (B₁ x) + b₁)) + b₂ + residual`: an MLP of low-rank linears whose hidden [M, D] is never stored.

x [M, K], B₁ [r₁, K], A₁ [D, r₁], B₂ [r₂, D], A₂ [N, r₂] -> y [M, N]. FlashAttention with an activation in place of
softmax: a program owns BM rows, computes `T = B₁ x` [BM, r₁] once (the queries), walks over D in tiles of BD, with
A₁'s rows as keys and B₂'s columns as values,

    H = act(T A₁ᵀ + b₁) [BM, BD],    S += H B₂ᵀ [BM, r₂], S in fp32 registers,

and then over N with `y = S A₂ᵀ + b₂ + residual`. Tiles of y are never in the grid: each would compute H again.
T, H and S are rounded to the dtype where torch rounds them, products are summed in fp32.
fc1 may be dense (A₁ None, B₁ [D, K]): H's tile then takes a loop over K, with x read again from L2.
A dense fc2 is not taken: S would be [BM, N], wider than the registers.

With few rows there are fewer row blocks than processors: `split` gives each row block's D to several programs, which
write their S as fp32 partial sums; the expanding launch of lowrank_linear_split adds them up in their order.

Floor: `2 M (r₁ (K + D) + r₂ (D + N))` FLOPs, M (K + N) elements, D M activations, and whole waves of row blocks.
Registers, predicted times, what was tried: docs/kernels/lowrank_mlp.md.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lowrank_linear_split as linear_split
from . import tables
from .activations import activate
from .compilation import Case, where_taken
from .lowrank_mlp_config import (
    KERNEL,
    MOST_SPLITS,
    Config,
    block_rows,
    class_of,
    configs,
    constants,
    row_block,
    shared_memory,
    split,
    tiles,
)
from .row_blocks import accumulate, addressable, both, dense, expand, project, row, shrink, strides, through_memory
from .targets import Target, target_of
from .tiles import DTYPES


@triton.jit(do_not_specialize=["M"])
def _row_block(x, B1, A1, b1, B2, A2, b2, residual, y, T, M, r1, r2,
               x_sm, x_sk, B1_sr, B1_sk, A1_sd, A1_sr, b1_s, B2_sr, B2_sd, A2_sn, A2_sr, b2_s, res_sm, res_sn,
               K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr,
               BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
               R1A: tl.constexpr, R1B: tl.constexpr, R2A: tl.constexpr, R2B: tl.constexpr,
               ACT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """BM rows and SPAN of the hidden columns. SPAN < D: y is fp32, [shares, M, r2], and takes S. T: see `staged`."""
    dtype = x.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BM
    share = tl.program_id(1).to(tl.int64)
    rows = M - m
    x += m * x_sm
    if A1 is not None:
        ta, tb = shrink(x, rows, x_sm, x_sk, B1, B1_sr, B1_sk, r1, K, BM, BK, R1A, R1B, EVEN, PRECISION)
        if T is not None:
            T += (share * M + m) * r1
            ta = through_memory(ta, T, r1, r1, rows, R1A, BM)
            if R1B > 0:
                tb = through_memory(tb, T + R1A, r1, r1 - R1A, rows, R1B, BM)
        A1 += share * SPAN * A1_sd
    else:
        B1 += share * SPAN * B1_sr
    B2 += share * SPAN * B2_sd
    sa = tl.zeros((BM, R2A), tl.float32)
    sb = sa
    if R2B > 0:
        sb = tl.zeros((BM, R2B), tl.float32)
    left = (D - share * SPAN).to(tl.int32)  # hidden columns from this share's first on
    for d in range(0, SPAN, BD):
        if A1 is not None:
            p = project(ta, tb, A1, A1_sd, A1_sr, left - d, r1, BD, R1A, R1B, EVEN, PRECISION)
            A1 += tl.cast(BD, tl.int64) * A1_sd
        else:
            p = dense(x, rows, x_sm, x_sk, B1, B1_sr, B1_sk, left - d, K, BM, BD, BK, EVEN, PRECISION)
            B1 += tl.cast(BD, tl.int64) * B1_sr
        if b1 is not None:
            p += row(b1 + (share * SPAN + d) * b1_s, b1_s, left - d, BD, not EVEN)
        h = activate(p, ACT, dtype)
        if not EVEN:
            h = tl.where(tl.arange(0, BD)[None, :] < left - d, h, 0.0)
        sa, sb = accumulate(sa, sb, h.to(dtype), B2, B2_sr, B2_sd, left - d, r2, BD, R2A, R2B, EVEN, PRECISION)
        B2 += tl.cast(BD, tl.int64) * B2_sd
    if SPAN < D:
        y += (share * M + m) * r2
        i = tl.arange(0, BM)[:, None]
        j = tl.arange(0, R2A)[None, :]
        tl.store(y + (i * r2 + j), sa, mask=(i < rows) & (j < r2))
        if R2B > 0:
            j = R2A + tl.arange(0, R2B)[None, :]
            tl.store(y + (i * r2 + j), sb, mask=(i < rows) & (j < r2))
    else:
        sa, sb = both(sa, sb, r2, R2A, R2B, EVEN, dtype)
        if residual is not None:
            residual += m * res_sm
        expand(sa, sb, rows, A2, A2_sn, A2_sr, r2, b2, b2_s, residual, res_sm, res_sn, y + m * N,
               N, BM, BN, R2A, R2B, EVEN, PRECISION)  # fmt: skip


def run(
    x: Tensor,
    B1: Tensor,
    A1: Tensor | None,
    b1: Tensor | None,
    B2: Tensor,
    A2: Tensor | None,
    b2: Tensor | None,
    residual: Tensor | None,
    act: str,
) -> Tensor:
    """y [..., N] of x [..., K], one launch. Raises Unsupported.

    Any strides are taken; x or a residual whose leading dimensions have no common stride is copied once.
    """
    return _run(row_block, x, B1, A1, b1, B2, A2, b2, residual, act)


def run_split(
    x: Tensor,
    B1: Tensor,
    A1: Tensor | None,
    b1: Tensor | None,
    B2: Tensor,
    A2: Tensor | None,
    b2: Tensor | None,
    residual: Tensor | None,
    act: str,
) -> Tensor:
    """As `run`, with the hidden width shared by several programs and a second launch that adds up and expands."""
    return _run(split, x, B1, A1, b1, B2, A2, b2, residual, act)


def _run(variant: Any, x: Tensor, B1: Tensor, A1: Any, b1: Any, B2: Tensor, A2: Any, b2: Any, residual: Any,
         act: str) -> Tensor:  # fmt: skip
    K, M, D = x.shape[-1], math.prod(x.shape[:-1]), B2.shape[1]
    r1, r2, N = None if A1 is None else B1.shape[0], B2.shape[0], B2.shape[0] if A2 is None else A2.shape[0]
    target = target_of(x.device)
    config = variant(M, K, D, N, r1, None if A2 is None else r2, x.dtype, target)
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if M == 0:
        return y
    x, residual = addressable(x.reshape(M, K)), None if residual is None else addressable(residual.reshape(M, N))
    B1, B2, A2 = addressable(B1), addressable(B2), addressable(A2)
    A1 = None if A1 is None else addressable(A1)

    def launch(config: Config) -> None:
        span = triton.cdiv(triton.cdiv(D, config.BD), config.splits) * config.BD
        shares = triton.cdiv(D, span)
        S = y if shares == 1 else torch.empty((shares, M, r2), dtype=torch.float32, device=x.device)
        T = torch.empty((shares, M, r1), dtype=x.dtype, device=x.device) if config.staged and r1 else None
        _row_block[(tiles(M, config), shares)](
            x, B1, A1, b1, B2, A2, b2, residual, S, T, M, r1 or 0, r2, *x.stride(), *B1.stride(), *strides(A1, 2),
            *strides(b1, 1), *B2.stride(), *A2.stride(), *strides(b2, 1), *strides(residual, 2),
            **constants(config, K, D, N, r1, r2, span if shares > 1 else max(span, D), act, x.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if shares > 1:
            adds = adding(M, N, r2, shares, x.dtype, target)
            linear_split.launch_expand(S, A2, b2, residual, y.view(M, N), "none", adds)

    with torch.cuda.device_of(x):
        sizes = {"M": M, "K": K, "D": D, "N": N, **class_of(block_rows(M, target.sms), r1, r2)}
        measured = None
        if variant is row_block:
            measured = tables.measure(KERNEL, lambda: configs(r1, r2, x.dtype, target), sizes, x.dtype, target, launch)
        launch(measured or config)
    return y


def adding(M: int, N: int, r2: int, shares: int, dtype: torch.dtype, target: Target) -> linear_split.Config:
    """The tiles with which lowrank_linear_split's second launch adds up so many partial sums and expands them."""
    return replace(linear_split.split(M, r2, N, r2, dtype, target), splits=shares, expand_stages=1)


def cases(target: Target) -> list[Case]:
    """What is compiled without a GPU: ViT-B's MLP at real ranks, with what costs registers."""
    K, D, N = 768, 3072, 768

    @where_taken
    def case(
        type_: str, r1: int | None, r2: int, act: str, M: int | None = None, shares: int = 1, residual: bool = True,
        sm_80: int = 255, sm_90: int = 255, D: int = D,
    ) -> Case:  # fmt: skip
        dtype = DTYPES[type_]
        config = replace(row_block(M, K, D, N, r1, r2, dtype, target), splits=shares)
        span = triton.cdiv(triton.cdiv(D, config.BD), shares) * config.BD
        values = constants(config, K, D, N, r1, r2, span if shares > 1 else max(span, D), act, dtype)
        pointers = ["x", "B1", "b1", "B2", "A2", "b2", "y"]
        sizes = ["r1", "r2", "x_sm", "B1_sr", "A1_sd", "B2_sr", "A2_sn", "res_sm"]
        for name, there in (("A1", r1 is not None), ("residual", residual), ("T", config.staged and r1 is not None)):
            pointers += [name] * bool(there)
            values |= {} if there else {name: None}
        values |= dict.fromkeys(["x_sk", "B1_sk", "A1_sr", "b1_s", "B2_sd", "A2_sr", "b2_s", "res_sn"], 1)
        types = {**dict.fromkeys(pointers, f"*{type_}"), **dict.fromkeys([*sizes, "M"], "i32")}
        what = f"r1={r1} r2={r2} BM={config.BM} {act}{f' D={D}' * (D != 3072)}{' + residual' * residual}"
        return Case(
            f"lowrank_mlp.{'split' if shares > 1 else 'row_block'} {type_} {what}",
            _row_block,
            types | ({"y": "*fp32"} if shares > 1 else {}),
            values,
            config.num_warps,
            config.num_stages,
            {"sm_80": sm_80, "sm_90": sm_90},
            (*pointers, *sizes),
            tensor_cores=type_ != "fp32",
            shared=shared_memory(config, r1, r2, dtype),
        )

    @where_taken
    def adds(shares: int, sm_80: int, sm_90: int) -> Case:
        config = adding(197, N, 128, shares, torch.bfloat16, target)
        values = linear_split.expand_constants(N, 128, "none", config, torch.bfloat16)
        pointers, sizes = ["A", "bias", "residual", "y"], ["r", "san", "srm"]
        return Case(
            f"lowrank_mlp.split adds bf16 r2=128 shares={shares}",
            linear_split.expand,
            {**dict.fromkeys(pointers, "*bf16"), **dict.fromkeys([*sizes, "M"], "i32"), "T": "*fp32"},
            values | dict.fromkeys(["sar", "sb", "srn"], 1),
            config.expand_warps,
            1,
            {"sm_80": sm_80, "sm_90": sm_90},
            (*pointers, *sizes, "T"),
            shared=linear_split.shared_memory(config, torch.bfloat16),
        )

    return [
        *adds(MOST_SPLITS, 255, 176),
        *case("bf16", 64, 64, "gelu", sm_80=174, sm_90=231),
        *case("bf16", 96, 96, "gelu", sm_80=195, sm_90=245),
        *case("bf16", 128, 128, "gelu", sm_80=195, sm_90=247),
        *case("fp16", 128, 128, "gelu_tanh", sm_80=204, sm_90=247),
        *case("bf16", 100, 80, "silu", D=2891, sm_80=255, sm_90=249),
        *case("bf16", 192, 192, "gelu", sm_80=253, sm_90=235),
        *case("bf16", 256, 256, "gelu", sm_80=247, sm_90=247),
        *case("fp16", 256, 128, "gelu", residual=False, sm_80=240, sm_90=214),
        *case("bf16", None, 128, "gelu", sm_80=255, sm_90=255),
        *case("bf16", 128, 128, "gelu", M=197, shares=16, sm_80=186, sm_90=233),
        *case("bf16", 256, 256, "gelu", M=197, shares=16, sm_80=255, sm_90=255),
        *case("fp32", 128, 128, "gelu", sm_80=128, sm_90=104),
    ]
