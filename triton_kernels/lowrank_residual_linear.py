"""`y = A (B x) + R x + b` in one pass over x, R as codes with group scales or as blocks on the diagonal.

x [M, K], B [r, K], A [N, r], b [N] -> y [M, N]. A program owns a tile [BM, BN] of y. While it walks over K it sums two
products of the same tile of x in fp32 registers: `T = x Bᵀ` [BM, r] and `Yᵀ = R xᵀ` [BN, BM], whose R is scaled to x's
dtype in registers as it comes; then `Yᵀ += A Tᵀ + b`. Yᵀ and not Y, because Hopper's wgmma takes its first operand from
registers: what was just dequantised need not pass through shared memory, and products stay in flight meanwhile.

Floor: 2 M (r (K + N) + K N) FLOPs (blockdiag: N K/nb for K N) over x, y, A, B and the codes once. Every column of tiles
computes T again, 2 M r K FLOPs each: r/BN more than R x itself. `two_pass` computes T once, in a launch of its own.
Dense codes save no FLOPs: they save memory and, at few rows, the bytes of W; blocks save FLOPs too.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from . import tables
from .codes import load_codes
from .compilation import Case
from .targets import TARGETS, Target, Unsupported, target_of

NAME = "lowrank_residual_linear"
CODE_BYTES = {"int8": 1.0, "int4": 0.5, "fp8": 1.0}
_FP8 = ("sm_89", "sm_90", "sm_100", "sm_120")  # architectures that convert e4m3fn themselves
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


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


def split(r: int) -> tuple[int, int]:
    """r rounded up to a multiple of 16, as a sum of at most two powers of two (the second one may be 0)."""
    rest = -(-r // 16) * 16
    first = 1 << rest.bit_length() - 1
    second = triton.next_power_of_2(max(rest - first, 16)) if rest > first else 0
    return (2 * first, 0) if second == first else (first, second)


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


def shrink_tiles(config: Config, r: int, size: int) -> tuple[int, int, int]:
    """BM, columns of T and BK of the launch that computes T; small, so that there are enough programs."""
    BM, widest, BK = (min(config.BM, 64), 128, 32) if size == 2 else (32, 64, 16)
    return BM, min(widest, triton.next_power_of_2(max(r, 16))), BK


def shared_memory(config: Config, width: int, form: str, size: int) -> int:
    """Bytes of shared memory, never below what the compiler takes: the loop's buffers, or what the end needs.

    `width`: columns of T that are summed along (0: T comes from memory), `size`: bytes of an element of x.
    """
    code = CODE_BYTES.get(form, size)
    loop = config.num_stages * config.BK * (size * (config.BM + width) + code * config.BN)
    end = 4 * config.BM * config.BN + size * (config.BM + config.BN) * (width or chunk(size) * config.num_stages)
    return int(max(loop, end))


def _config(
    M: int | None, K: int, N: int, r: int, form: str, group_size: int, dtype: torch.dtype, target: Target, fused: bool
) -> Config:
    if dtype not in _NAMES:
        raise Unsupported(f"x is {dtype}, taken are {', '.join(_NAMES.values())}")
    if target.backend == "interpreter" and dtype == torch.bfloat16:
        raise Unsupported("x is bf16, whose products are wrong in Triton's interpreter; fp32 and fp16 are taken")
    if form not in (*CODE_BYTES, "blockdiag"):
        raise Unsupported(f"form {form!r}, taken are {', '.join(CODE_BYTES)} and blockdiag")
    if r < 1:
        raise Unsupported(f"r = {r}, taken are ranks from 1 on")
    width = sum(split(r)) if fused else 0
    sizes = _sizes(M or 12608, K, N, width, form)
    rows = tables.nearest(NAME, target, dtype, **sizes)
    if rows is None:  # what fits an A100 fits, after shrinking, the architectures that have no rows of their own
        rows = tables.nearest(NAME, TARGETS["sm_80"], dtype, **sizes)
    assert rows is not None, "the table of tiles is missing"
    config = Config(**rows)
    config = replace(config, BK=depth(K, form, group_size, config.BK))
    while shared_memory(config, width, form, dtype.itemsize) > target.shared_memory:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.BM > 32:
            config = replace(config, BM=config.BM // 2)
        else:
            taken = shared_memory(config, width, form, dtype.itemsize)
            raise Unsupported(f"{taken} bytes of shared memory, {target.name} has {target.shared_memory}")
    return config


def _sizes(M: int, K: int, N: int, width: int, form: str) -> dict[str, int]:
    """By what a row of the table is found; `r` is the width that is summed along, 1 for none."""
    return {"M": M, "K": K, "N": N, "r": max(width, 1), "form": (*CODE_BYTES, "blockdiag").index(form)}


def configs(
    M: int, K: int, N: int, r: int, form: str, group_size: int, dtype: torch.dtype, target: Target, fused: bool
) -> list[Config]:
    """What autotuning tries: the table's own choice and its neighbours that fit."""
    own = _config(M, K, N, r, form, group_size, dtype, target, fused)
    tried, width = [own], sum(split(r)) if fused else 0
    for BM in (16, 32, 64, 128):
        for BN in (64, 128):
            for warps in (4, 8):
                other = replace(own, BM=BM, BN=BN, num_warps=warps)
                if other not in tried and shared_memory(other, width, form, dtype.itemsize) <= target.shared_memory:
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


@triton.jit
def _shrink(x, B, t, M, r, sxm, sxk, sbr, sbk, K: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    acc = tl.zeros((BM, BR), tl.float32)
    steps = tl.arange(0, BK).to(tl.int64)
    for k0 in range(0, K, BK):
        k = k0 + steps
        inside = (steps < (K - k0 if K % BK else BK))[None, :]
        x_block = tl.load(x + m[:, None] * sxm + k[None, :] * sxk, mask=(m < M)[:, None] & inside, other=0.0)
        b_block = tl.load(B + c[:, None] * sbr + k[None, :] * sbk, mask=(c < r)[:, None] & inside, other=0.0)
        acc = tl.dot(x_block, b_block.T, acc, input_precision=PRECISION)
    tl.store(t + m[:, None] * r + c[None, :], acc.to(t.dtype.element_ty), mask=(m < M)[:, None] & (c < r)[None, :])


@triton.jit
def _expand(acc, t, A, n, live, c, r, san, sar, PRECISION: tl.constexpr):
    """acc [BN, BM] += A[n, c] tᵀ for t [BM, R], the columns c of T; beyond the rank t may hold NaN: Inf · 0."""
    a = tl.load(A + n[:, None] * san + c[None, :] * sar, mask=live[:, None] & (c < r)[None, :], other=0.0)
    t = tl.where((c < r)[None, :], t, 0.0).to(a.dtype)
    return tl.dot(a, t.T, acc, input_precision=PRECISION)


@triton.jit
def _residual(
    x, B, A, R, scale, bias, t, y, M, N, r, sxm, sxk, sbr, sbk, san, sar, srb, srn, srk, ssn, ssg, sb,
    K: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of y. R1 + R2 columns of T are summed along; or R1 = 0, and T [M, r] is read in CHUNKS of columns."""
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
        acc = _expand(acc, t1, A, n, live, r1, r, san, sar, PRECISION)
    if R2:
        acc = _expand(acc, t2, A, n, live, r2, r, san, sar, PRECISION)
    for c0 in range(0, CHUNKS * CHUNK, CHUNK):
        c = c0 + tl.arange(0, CHUNK).to(tl.int64)
        part = tl.load(t + m[:, None] * r + c[None, :], mask=(m < M)[:, None] & (c < r)[None, :], other=0.0)
        acc = _expand(acc, part, A, n, live, c, r, san, sar, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + n * sb, mask=live, other=0.0).to(tl.float32)[:, None]
    tl.store(y + m[None, :] * N + n[:, None], acc.to(dtype), mask=(m < M)[None, :] & live[:, None])


def _form(form: str, target: Target) -> str:
    """The form as the kernel takes it: fp8 is decoded by hand where the architecture cannot."""
    return "fp8_bits" if form == "fp8" and target.name not in _FP8 else form


def run_one_pass(x, B, A, R, scale, bias, form, group_size):
    """`A (B x) + R x + b` in one launch; the arguments and the result are those of the op."""
    return _run(x, B, A, R, scale, bias, form, group_size, fused=True)


def run_two_pass(x, B, A, R, scale, bias, form, group_size):
    """`T = x Bᵀ` in a launch of its own, the rest in a second one; the arguments and the result are those of the op."""
    return _run(x, B, A, R, scale, bias, form, group_size, fused=False)


def _run(
    x: torch.Tensor,
    B: torch.Tensor,
    A: torch.Tensor,
    R: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    form: str,
    group_size: int,
    fused: bool,
) -> torch.Tensor:
    (r, K), N = B.shape, A.shape[0]
    rows = x.reshape(-1, K)  # a view, or a copy where no strides describe it
    M = rows.shape[0]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    target = target_of(x.device)
    config = (one_pass if fused else two_pass)(M, K, N, r, form, group_size, x.dtype, target)
    launch = partial(_launch, rows, B, A, R, scale, bias, y, form, group_size, fused, target)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        sizes = _sizes(M, K, N, sum(split(r)) if fused else 0, form)
        known = {**sizes, "target": target.name, "bits": 8 * x.element_size()}
        if tables.autotuning() and not any(known.items() <= row.items() for row in tables.measured(NAME)):
            tried = [asdict(c) for c in configs(M, K, N, r, form, group_size, x.dtype, target, fused)]
            card = torch.cuda.get_device_name(x.device) if x.is_cuda else "interpreter"
            tables.tune(NAME, target, x.dtype, sizes, tried, lambda c: launch(Config(**c)), card)
            config = (one_pass if fused else two_pass)(M, K, N, r, form, group_size, x.dtype, target)
        launch(config)
    return y


def _launch(
    x: torch.Tensor,
    B: torch.Tensor,
    A: torch.Tensor,
    R: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    form: str,
    group_size: int,
    fused: bool,
    target: Target,
    config: Config,
) -> None:
    (M, K), N, r = x.shape, A.shape[0], B.shape[0]
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    t = y  # not read where T stays in registers
    if not fused:
        t = torch.empty((M, r), dtype=x.dtype, device=x.device)
        BM, BR, BK = shrink_tiles(config, r, x.element_size())
        _shrink[(-(-M // BM), -(-r // BR))](
            x, B, t, M, r, *x.stride(), *B.stride(), K, BM, BR, BK, precision, num_warps=4, num_stages=3
        )  # fmt: skip
    blocks = form == "blockdiag"
    R1, R2 = split(r) if fused else (0, 0)
    columns = chunk(x.element_size())
    _residual[(tiles(M, K, N, form, group_size, config),)](
        x, B, A, R, x if scale is None else scale, x if bias is None else bias, t, y, M, N, r,
        *x.stride(), *B.stride(), *A.stride(), *(R.stride() if blocks else (0, *R.stride())),
        *((0, 0) if scale is None else scale.stride()), 0 if bias is None else bias.stride(0),
        K, group_size if blocks else min(group_size, K), _form(form, target), R1, R2,
        0 if fused else -(-r // columns), columns, config.BM, config.BN, config.BK, bias is not None, precision,
        **options,
    )  # fmt: skip


def cases(target: Target) -> list[Case]:
    """Specialisations that must compile without spills, with bounds on their registers."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    sizes = [
        # form, dtype, M, r, one launch; the most registers on sm_80 and sm_90
        ("int8", bf16, 12608, 32, True, 176, 182),
        ("int8", bf16, 12608, 64, True, 188, 215),
        ("int8", bf16, 12608, 128, True, 0, 244),
        ("int4", bf16, 12608, 32, True, 212, 184),
        ("int4", fp16, 12608, 48, True, 183, 185),
        ("fp8", bf16, 12608, 32, True, 178, 182),
        ("blockdiag", bf16, 12608, 32, True, 152, 150),
        ("int8", bf16, 16, 32, True, 136, 88),
        ("int4", bf16, 12608, 256, False, 176, 187),
        ("int8", fp16, 12608, 192, False, 186, 140),
        ("int8", fp32, 12608, 64, True, 180, 184),
        ("int4", fp32, 12608, 192, False, 120, 114),
    ]
    found = []
    for form, dtype, M, r, fused, *registers in sizes:
        try:
            config = (one_pass if fused else two_pass)(M, 768, 768, r, form, 64, dtype, target)
        except Unsupported:
            continue
        bounds = dict(zip(("sm_80", "sm_90"), registers, strict=True))
        found.append(_case(form, dtype, M, r, fused, config, target, bounds))
    for dtype, *registers in ((bf16, 136, 104), (fp32, 104, 104)):
        config = two_pass(12608, 768, 768, 256, "int8", 64, dtype, target)
        found.append(_shrink_case(dtype, config, dict(zip(("sm_80", "sm_90"), registers, strict=True))))
    return found


def _shrink_case(dtype: torch.dtype, config: Config, bounds: dict[str, int]) -> Case:
    """The launch that computes T [M, 256] of a layer with 768 inputs."""
    BM, BR, BK = shrink_tiles(config, 256, dtype.itemsize)
    constants = {"K": 768, "BM": BM, "BR": BR, "BK": BK, "PRECISION": "ieee", "sxk": 1, "sbk": 1}
    types = {name: f"*{_NAMES[dtype]}" for name in ("x", "B", "t")} | dict.fromkeys(("M", "r", "sxm", "sbr"), "i32")
    return Case(
        f"shrink {_NAMES[dtype]} r=256", _shrink, types, constants, 4, 3, bounds, tuple(types),
        tensor_cores=dtype != torch.float32,
    )  # fmt: skip


def _case(
    form: str, dtype: torch.dtype, M: int, r: int, fused: bool, config: Config, target: Target, bounds: dict[str, int]
) -> Case:
    """The specialisation of a 768 x 768 layer with groups or blocks of 64 columns, as `_launch` makes it."""
    pointer = f"*{_NAMES[dtype]}"
    types = {name: pointer for name in ("x", "B", "A", "scale", "bias", "t", "y")}
    types["R"] = {"int8": "*i8", "blockdiag": pointer}.get(form, "*u8")
    columns = chunk(dtype.itemsize)
    constants: dict[str, Any] = {
        "K": 768, "GROUP": 64, "FORM": _form(form, target), "CHUNK": columns,
        "CHUNKS": 0 if fused else -(-r // columns),
        "BM": config.BM, "BN": config.BN, "BK": config.BK, "HAS_BIAS": True, "PRECISION": "ieee",
        "sxk": 1, "sbk": 1, "sar": 1, "srk": 1, "ssg": 1, "sb": 1,
    }  # fmt: skip
    constants["R1"], constants["R2"] = split(r) if fused else (0, 0)
    aligned = ("x", "B", "A", "R", "scale", "bias", "t", "y", "M", "N", "r", "sxm", "sbr", "san", "srb", "srn")
    integers = {name: "i32" for name in _residual.arg_names if name not in types and name not in constants}
    name = f"{form} {_NAMES[dtype]} M={M} r={r} {'one' if fused else 'two'} pass"
    return Case(
        name, _residual, {**types, **integers}, constants, config.num_warps, config.num_stages, bounds, aligned,
        tensor_cores=dtype != torch.float32,
    )  # fmt: skip
