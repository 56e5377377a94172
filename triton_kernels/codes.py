"""Codes of a compact residual inside kernels: bytes to values on fp32, in registers.

The layouts are those of `vitlr.ops.layers.codes`: int8; int4, two to a byte, even column low, 8 added; fp8, bits of
e4m3fn.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fp8_from_bits(codes):
    """e4m3fn by hand, where the architecture has no such dtype: its exponent and mantissa, moved into an fp16.

    Exponents are 7 and 15 above the true one, so that the fp16 is 2⁸ too small: exact, subnormals included.
    """
    bits = codes.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def load_codes(R, n, live, k0, srn, srk, FORM: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Values [BN, BK] of the codes of rows n from column k0 on; rows that are not live hold some finite value.

    FORM int8, int4, fp8, or fp8_bits for fp8 decoded by hand. A packed byte is loaded once and its two nibbles
    interleaved in registers: x stays as it lies in memory, where every second column would be a slow load.
    """
    if FORM == "int4":
        k = k0 // 2 + tl.arange(0, BK // 2).to(tl.int64)
        inside = live[:, None]
        if K % BK:
            inside = inside & (k < (K + 1) // 2)[None, :]
        codes = tl.load(R + n[:, None] * srn + k[None, :] * srk, mask=inside, other=0)
        value = tl.interleave(codes & 15, codes >> 4).to(tl.float32) - 8.0
    else:
        k = k0 + tl.arange(0, BK).to(tl.int64)
        inside = live[:, None]
        if K % BK:
            inside = inside & (k < K)[None, :]
        codes = tl.load(R + n[:, None] * srn + k[None, :] * srk, mask=inside, other=0)
        if FORM == "fp8":
            value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        elif FORM == "fp8_bits":
            value = fp8_from_bits(codes)
        else:
            tl.static_assert(FORM == "int8", "unknown form")
            value = codes.to(tl.float32)
    return value
