"""What kernels share that keep a block of rows from the first product to the last.

A rank is held as two parts, powers of two of which the second may be 0: 192 is 128 + 64, never padded to 256. Where
RB is 0, the second part is the first one once more, and no code reads it.

Addresses are a base, advanced in int64, plus offsets within a tile in int32, which stay the same in a loop and take
half the registers; `addressable` is what makes those safe. EVEN: the tiles divide K, D, N and both ranks, and only
rows are masked. Where they do not, columns beyond the end are set to 0 after each product: a row that holds Inf would
leave NaN there (Inf times a masked 0), and the next product would spread it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LARGEST_STRIDE = 2**22
"""In elements: tiles have at most 256 rows or columns of it, and their offsets stay below 2^31."""


def addressable(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where a stride is so large that offsets within a tile would not fit int32."""
    return tensor if max(map(abs, tensor.stride())) <= LARGEST_STRIDE else tensor.contiguous()


def strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """The strides of a tensor, zeros for none."""
    return (0,) * dimensions if tensor is None else tensor.stride()


@triton.jit
def tile(w, I, si, J, sj, BI: tl.constexpr, BJ: tl.constexpr, MASK_I: tl.constexpr, MASK_J: tl.constexpr):  # noqa: E741
    """The elements [BI, BJ] from w on, zeros outside [I, J] where masked."""
    i, j = tl.arange(0, BI)[:, None], tl.arange(0, BJ)[None, :]
    p = w + (i * si + j * sj)
    if MASK_I and MASK_J:
        return tl.load(p, mask=(i < I) & (j < J), other=0.0)
    if MASK_I:
        return tl.load(p, mask=i < I, other=0.0)
    if MASK_J:
        return tl.load(p, mask=j < J, other=0.0)
    return tl.load(p)


@triton.jit
def row(b, b_s, J, BJ: tl.constexpr, MASK: tl.constexpr):
    """The elements [1, BJ] from b on in fp32, zeros outside J."""
    j = tl.arange(0, BJ)
    values = tl.load(b + j * b_s, mask=j < J, other=0.0) if MASK else tl.load(b + j * b_s)
    return values.to(tl.float32)[None, :]


@triton.jit
def within(t, r, R: tl.constexpr, EVEN: tl.constexpr):
    """t [BM, R] in fp32 with zeros from column r on, NaN and Inf there included.

    By a minimum of bits, not by `tl.where`: a choice made on an accumulator after a pipelined loop has the assembler of
    Triton 3.6 wait for every wgmma of the kernel before it issues the next (ptxas C7514, "serialized").
    """
    if EVEN:
        return t
    live = ((tl.arange(0, R) - r) >> 31).to(tl.uint32, bitcast=True)  # all ones where the column exists, else 0
    return tl.minimum(t.to(tl.uint32, bitcast=True), live[None, :]).to(tl.float32, bitcast=True)


@triton.jit
def both(sa, sb, r, RA: tl.constexpr, RB: tl.constexpr, EVEN: tl.constexpr, dtype: tl.constexpr):
    """The two parts with zeros beyond the rank, rounded to dtype as torch rounds its intermediates."""
    sa = within(sa, r, RA, EVEN).to(dtype)
    sb = within(sb, r - RA, RB, EVEN).to(dtype) if RB > 0 else sa
    return sa, sb


@triton.jit
def shrink(x, rows, x_sm, x_sk, B, B_sr, B_sk, r, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
           RA: tl.constexpr, RB: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`T = x Bᵀ` for `rows` rows from x on, in the parts [BM, RA] and [BM, RB], rounded to x's dtype as torch does."""
    ta = tl.zeros((BM, RA), tl.float32)
    tb = ta
    if RB > 0:
        tb = tl.zeros((BM, RB), tl.float32)
    for k in range(0, K, BK):
        b_x = tile(x, rows, x_sm, K - k, x_sk, BM, BK, True, not EVEN)
        b_B = tile(B, K - k, B_sk, r, B_sr, BK, RA, not EVEN, not EVEN)
        ta = tl.dot(b_x, b_B, ta, input_precision=PRECISION)
        if RB > 0:
            b_B = tile(B + tl.cast(RA, tl.int64) * B_sr, K - k, B_sk, r - RA, B_sr, BK, RB, not EVEN, not EVEN)
            tb = tl.dot(b_x, b_B, tb, input_precision=PRECISION)
        x += tl.cast(BK, tl.int64) * x_sk
        B += tl.cast(BK, tl.int64) * B_sk
    return both(ta, tb, r, RA, RB, EVEN, x.dtype.element_ty)


@triton.jit
def through_memory(t, w, stride, r, rows, R: tl.constexpr, BM: tl.constexpr):
    """A part [BM, R] of T, written to w and read back: an operand then in shared memory, not in registers."""
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, R)[None, :]
    p = w + (i * stride + j)
    inside = (i < rows) & (j < r)
    tl.store(p, t, mask=inside)
    tl.debug_barrier()  # other threads of the block wrote what this one reads
    return tl.load(p, mask=inside, other=0.0)


@triton.jit
def project(ta, tb, A, A_sn, A_sr, n, r, BN: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr,
            EVEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`T Aᵀ` for n rows of A, [BM, BN] in fp32, from T in its two parts."""
    p = tl.dot(ta, tile(A, r, A_sr, n, A_sn, RA, BN, not EVEN, not EVEN), input_precision=PRECISION)
    if RB > 0:
        b_A = tile(A + tl.cast(RA, tl.int64) * A_sr, r - RA, A_sr, n, A_sn, RB, BN, not EVEN, not EVEN)
        p = tl.dot(tb, b_A, p, input_precision=PRECISION)
    return p


@triton.jit
def dense(x, rows, x_sm, x_sk, W, W_sd, W_sk, d, K: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
          BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`x Wᵀ` for d rows of W, [BM, BD] in fp32."""
    p = tl.zeros((BM, BD), tl.float32)
    for k in range(0, K, BK):
        b_x = tile(x, rows, x_sm, K - k, x_sk, BM, BK, True, not EVEN)
        b_W = tile(W, K - k, W_sk, d, W_sd, BK, BD, not EVEN, not EVEN)
        p = tl.dot(b_x, b_W, p, input_precision=PRECISION)
        x += tl.cast(BK, tl.int64) * x_sk
        W += tl.cast(BK, tl.int64) * W_sk
    return p


@triton.jit
def accumulate(sa, sb, h, B, B_sr, B_sd, d, r, BD: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr,
               EVEN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`S + h Bᵀ` over d hidden columns, S in its two parts [BM, RA] and [BM, RB]."""
    sa = tl.dot(h, tile(B, d, B_sd, r, B_sr, BD, RA, not EVEN, not EVEN), sa, input_precision=PRECISION)
    if RB > 0:
        b_B = tile(B + tl.cast(RA, tl.int64) * B_sr, d, B_sd, r - RA, B_sr, BD, RB, not EVEN, not EVEN)
        sb = tl.dot(h, b_B, sb, input_precision=PRECISION)
    return sa, sb


@triton.jit
def expand(sa, sb, rows, A, A_sn, A_sr, r, b, b_s, residual, res_sm, res_sn, y, N: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, EVEN: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """`y = S Aᵀ + b + residual` for `rows` rows of a contiguous y [*, N], all columns."""
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    for n in range(0, N, BN):
        p = project(sa, sb, A, A_sn, A_sr, N - n, r, BN, RA, RB, EVEN, PRECISION)
        if b is not None:
            p += row(b + tl.cast(n, tl.int64) * b_s, b_s, N - n, BN, not EVEN)
        if residual is not None:
            p += tile(residual, rows, res_sm, N - n, res_sn, BM, BN, True, not EVEN).to(tl.float32)
            residual += tl.cast(BN, tl.int64) * res_sn
        inside = i < rows if EVEN else (i < rows) & (j < N - n)
        tl.store(y + n + (i * N + j), p.to(y.dtype.element_ty), mask=inside)
        A += tl.cast(BN, tl.int64) * A_sn
