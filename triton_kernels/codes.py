"""Bytes inside kernels: codes of a compact residual to fp32 values, values to e4m3, and the scales of its rows.

The layouts of residuals are those of `vitlr.ops.layers.codes`: int8; int4, two to a byte, even column low, 8 added;
fp8, bits of e4m3fn.
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


LARGEST = tl.constexpr(416.0)
"""What a row's scale is chosen for: e4m3 ends at 448, and a row that was rounded once may be 1/16 longer."""


@triton.jit
def scale_of(reach):
    """The least power of two with `416 scale >= reach`, so that to divide by it rounds nothing; its inverse.

    NaN where reach is NaN or Inf: a row's scale tells of it, whatever became of its bytes.
    """
    bits = tl.maximum(reach * (1.0 / LARGEST), 1e-30).to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFFFF) & 0x7F800000
    return bits.to(tl.float32, bitcast=True) + 0.0 * reach, (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def e4m3(p, BY_HAND: tl.constexpr):
    """p in e4m3, to the nearest, ties to even, ends at ±448. BY_HAND: the interpreter's own carries are wrong."""
    if BY_HAND:
        # 2^-120 moves the least normal number to that of fp32, so that the exponents are the same, subnormals included.
        bits = (tl.minimum(tl.abs(p), 448.0) * 7.52316384526264e-37).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
        bits = tl.where(p != p, 0x7F, bits) | tl.where(p < 0, 0x80, 0)
        return bits.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return p.to(tl.float8e4nv)
