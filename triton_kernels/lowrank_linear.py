"""`y = act((x Bᵀ) Aᵀ + b) + residual` in one pass over x, for many rows and ranks up to 256.

x [M, K], B [r, K], A [N, r], b [N], residual [M, N] -> y [M, N]. A program owns BM rows: `T = x Bᵀ` [BM, r] is summed
in fp32 registers over K, rounded to the dtype as torch rounds its own intermediate (fp32 is not; only the order of the
sum differs), and multiplied with one tile of A after the other. T never leaves the registers, x is read once and y
written once: `2 M r (K + N)` FLOPs over `(M + r) (K + N)` elements. Bias, activation and residual meet the fp32
product, which is rounded once. A rank is held as a sum of two powers of two, 192 = 128 + 64, not as the next one.
Tiles, registers and predicted times: docs/kernels/lowrank_linear.md.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables
from .activations import activate
from .compilation import Case, where_taken
from .row_blocks import within
from .targets import Target, Unsupported, target_of
from .tiles import DTYPES, check_dtype, check_sizes, fitting, precision, two_powers

KERNEL = "lowrank_linear"
LARGEST_RANK = 256
SMALLER = (
    ("expand_stages", 2), ("shrink_stages", 2), ("BK", 32), ("BM", 64), ("BN", 32), ("BM", 32), ("BK", 16), ("BN", 16),
    ("BM", 16),
)  # fmt: skip
"""How tiles are cut down where shared memory is short."""


@dataclass(frozen=True)
class Config:
    """Rows, columns and depth of the tiles; stages of the loop over K and of that over N; warps."""

    BM: int
    BN: int
    BK: int
    shrink_stages: int
    expand_stages: int
    num_warps: int


def row_block(M: int | None, K: int, N: int, r: int, residual: bool, dtype: torch.dtype, target: Target) -> Config:
    """The tiles of a shape; M is None where the rows are not known.

    Raises Unsupported for a dtype, rank or size that is not taken and where no tiles fit the shared memory.
    """
    check_dtype(dtype, target)
    check_sizes(K=K, N=N, r=r)
    if r > LARGEST_RANK:
        raise Unsupported(f"rank {r}, row_block holds [BM, r] in registers and takes up to {LARGEST_RANK}")
    row = tables.nearest(KERNEL, target, dtype, M=M, K=K, N=N, r=r)
    wanted = _tiles(r, dtype, target) if row is None else Config(**row)
    return fitting(wanted, SMALLER, lambda config: shared_memory(config, r, residual, dtype), target)


def configs(r: int, residual: bool, dtype: torch.dtype, target: Target) -> list[Config]:
    """What VITLR_AUTOTUNE measures: tiles that fit, larger ones first; in fp32 nothing."""
    if dtype is torch.float32:
        return []  # a measured row would not say whether it is of exact products or of TF32
    options = [
        Config(BM, BN, BK, stages, stages, 8 if BM == 128 else 4)
        for BM, BN, BK, stages in itertools.product((128, 64), (128, 64), (64, 32), (3, 2))
    ]
    return [option for option in options if shared_memory(option, r, residual, dtype) <= target.shared_memory]


def tiles(M: int, config: Config) -> int:
    """Programs launched."""
    return triton.cdiv(M, config.BM)


def shared_memory(config: Config, r: int, residual: bool, dtype: torch.dtype) -> int:
    """Bytes of shared memory, at least what the compilers take: the larger of the two loops, which share it.

    Compared with their figures for sm_80, sm_86, sm_89 and sm_90.
    """
    BM, BN, BK, size, R = config.BM, config.BN, config.BK, dtype.itemsize, sum(two_powers(r))
    shrink = config.shrink_stages * BK * (BM + R) * size
    expand = config.expand_stages * BN * (R + BM * residual) * size  # Triton stages the residual, too
    # y passes through shared memory from one layout to another, and so does T in fp32.
    passing = BM * (max(BN, R) if dtype is torch.float32 else BN) * 4
    return max(shrink, expand + passing) + 256


def _tiles(r: int, dtype: torch.dtype, target: Target) -> Config:
    """What is tried first where no table names the target, and in fp32."""
    R = sum(two_powers(r))
    halved = 1 if R <= 128 or target.hopper else 2
    if dtype is not torch.float32:
        return Config(128 // halved, 64, 64, 3, 3, 8)
    if precision(dtype) == "tf32":
        return Config(64 // halved, 64, 32, 3, 2, 8)
    # Without tensor cores a thread holds whole rows of its operands: T [BM, r] must be small.
    return Config(32 if R <= 128 else 16, 32, 32, 3, 2, 8)


@triton.jit(do_not_specialize=["M"])
def _row_block(x, B, A, bias, residual, y, M, r, sxm, sxk, sbr, sbk, san, sar, sb, srm, srn,
               K: tl.constexpr, N: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, EVEN: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHRINK_STAGES: tl.constexpr,
               EXPAND_STAGES: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """BM rows; EVEN: the rank is R1 + R2, and nothing of T has to be masked."""
    dtype = x.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK).to(tl.int64)
    r1 = tl.arange(0, R1).to(tl.int64)
    rows = (m < M)[:, None]
    x_tile = x + m[:, None] * sxm + k[None, :] * sxk  # [BM, BK]
    B1_tile = B + k[:, None] * sbk + r1[None, :] * sbr  # [BK, R1]
    t1 = tl.zeros((BM, R1), tl.float32)
    if R2:
        r2 = R1 + tl.arange(0, R2).to(tl.int64)
        B2_tile = B + k[:, None] * sbk + r2[None, :] * sbr  # [BK, R2]
        t2 = tl.zeros((BM, R2), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=SHRINK_STAGES):
        inside = k < (K - k0 if K % BK else BK)
        x_block = tl.load(x_tile, mask=rows & inside[None, :], other=0.0)
        B1_block = tl.load(B1_tile, mask=inside[:, None] & (r1 < r)[None, :], other=0.0)
        t1 = tl.dot(x_block, B1_block, t1, input_precision=PRECISION)
        if R2:
            B2_block = tl.load(B2_tile, mask=inside[:, None] & (r2 < r)[None, :], other=0.0)
            t2 = tl.dot(x_block, B2_block, t2, input_precision=PRECISION)
            B2_tile += BK * sbk
        x_tile += BK * sxk
        B1_tile += BK * sbk
    # Beyond the rank stands 0, or NaN where x holds Inf, which must not reach the second product.
    t1 = within(t1, r, R1, EVEN).to(dtype)
    if R2:
        t2 = within(t2, r - R1, R2, EVEN).to(dtype)
    for n0 in tl.range(0, N, BN, num_stages=EXPAND_STAGES):
        n = n0 + tl.arange(0, BN).to(tl.int64)
        columns = (n < N if N % BN else tl.arange(0, BN) < BN)[None, :]
        A1_block = tl.load(A + r1[:, None] * sar + n[None, :] * san, mask=(r1 < r)[:, None] & columns, other=0.0)
        p = tl.dot(t1, A1_block, input_precision=PRECISION)  # [BM, BN]
        if R2:
            A2_block = tl.load(A + r2[:, None] * sar + n[None, :] * san, mask=(r2 < r)[:, None] & columns, other=0.0)
            p = tl.dot(t2, A2_block, p, input_precision=PRECISION)
        if bias is not None:
            p += tl.load(bias + n[None, :] * sb, mask=columns, other=0.0).to(tl.float32)
        p = activate(p, ACT, dtype)
        if residual is not None:
            added = tl.load(residual + m[:, None] * srm + n[None, :] * srn, mask=rows & columns, other=0.0)
            p += added.to(tl.float32)
        tl.store(y + m[:, None] * N + n[None, :], p.to(dtype), mask=rows & columns)


def run(x: Tensor, B: Tensor, A: Tensor, bias: Tensor | None, residual: Tensor | None, act: str) -> Tensor:
    """y [..., N] of x [..., K]. Raises Unsupported.

    Any strides are taken; x or a residual whose leading dimensions have no common stride is copied once.
    """
    (r, K), N, M = B.shape, A.shape[0], math.prod(x.shape[:-1])
    target = target_of(x.device)
    config = row_block(M, K, N, r, residual is not None, x.dtype, target)
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if M == 0:
        return y
    x, residual = x.reshape(M, K), None if residual is None else residual.reshape(M, N)

    def launch(config: Config) -> None:
        R1, R2 = two_powers(r)
        _row_block[(tiles(M, config),)](
            x, B, A, bias, residual, y, M, r, *x.stride(), *B.stride(), *A.stride(),
            0 if bias is None else bias.stride(0), *((0, 0) if residual is None else residual.stride()),
            K=K, N=N, R1=R1, R2=R2, EVEN=r == R1 + R2, BM=config.BM, BN=config.BN, BK=config.BK,
            SHRINK_STAGES=config.shrink_stages, EXPAND_STAGES=config.expand_stages, ACT=act,
            PRECISION=precision(x.dtype), num_warps=config.num_warps,
        )  # fmt: skip

    with torch.cuda.device_of(x):
        options = partial(configs, r, residual is not None, x.dtype, target)
        launch(tables.measure(KERNEL, options, {"M": M, "K": K, "N": N, "r": r}, x.dtype, target, launch) or config)
    return y


def cases(target: Target) -> list[Case]:
    """What is compiled without a GPU: ViT-B's fc1 at real ranks, with what costs registers."""

    @where_taken
    def case(type_: str, r: int, act: str, residual: bool, sm_80: int, sm_90: int) -> Case:
        dtype = DTYPES[type_]
        config = row_block(None, 768, 3072, r, residual, dtype, target)
        R1, R2 = two_powers(r)
        pointers = ["x", "B", "A", "bias", "y", *["residual"] * residual]
        sizes = ["r", "sxm", "sbr", "san", "srm"]
        constants = {"sxk": 1, "sbk": 1, "sar": 1, "sb": 1, "srn": 1, "K": 768, "N": 3072, "R1": R1, "R2": R2}
        constants |= {"EVEN": r == R1 + R2}
        tiles_ = {"BM": config.BM, "BN": config.BN, "BK": config.BK}
        loops = {"SHRINK_STAGES": config.shrink_stages, "EXPAND_STAGES": config.expand_stages}
        return Case(
            f"lowrank_linear.row_block {type_} r={r} {act}{' + residual' * residual}",
            _row_block,
            {**dict.fromkeys(pointers, f"*{type_}"), **dict.fromkeys([*sizes, "M"], "i32")},
            {**constants, **tiles_, **loops, "ACT": act, "PRECISION": precision(dtype)}
            | ({} if residual else {"residual": None}),
            config.num_warps,
            config.shrink_stages,
            {"sm_80": sm_80, "sm_90": sm_90},
            (*pointers, *sizes),
            tensor_cores=type_ != "fp32",
            shared=shared_memory(config, r, residual, dtype),
        )

    return [
        *case("bf16", 64, "none", False, 136, 96),
        *case("bf16", 128, "none", False, 176, 128),
        *case("bf16", 128, "gelu", False, 176, 160),
        *case("bf16", 128, "gelu_tanh", False, 176, 128),
        *case("bf16", 128, "silu", True, 192, 168),
        *case("bf16", 192, "relu", True, 200, 176),
        *case("bf16", 192, "gelu", False, 200, 176),
        *case("bf16", 208, "gelu", False, 184, 192),  # masked: 16 columns beyond the rank
        *case("bf16", 256, "gelu", False, 184, 190),
        *case("bf16", 256, "none", True, 184, 200),
        *case("fp16", 128, "gelu", True, 186, 168),
        *case("fp32", 128, "gelu", True, 88, 104),
        *case("fp32", 256, "gelu", True, 124, 122),
    ]
