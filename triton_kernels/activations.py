"""Activations inside kernels: fp32 values in and out, as exact as the dtype that will hold the result can show.

A hidden layer is activated D times a token, so instructions count: at ViT-B, r = 128, one instruction an element
costs as much as 5 % of the tensor-core work. Instructions an element (SASS of sm_90, the same on sm_80):

    gelu        32 (tl.erf)      10 for fp16, 11 for bf16, 8 for e4m3
    gelu_tanh   16 (tl.sigmoid)  10
    silu        12 (tl.sigmoid)   8
    sigmoid     11 (tl.sigmoid)   8
    relu         2                1

NaN and infinities come out as torch has them (gelu(-inf) is NaN there too: -inf * 0).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .targets import Target

INSTRUCTIONS = {"none": 0, "gelu": 11, "gelu_tanh": 10, "silu": 8, "relu": 1, "sigmoid": 8}
"""Instructions an element with 16-bit results: what a kernel's floor counts."""


def issue_flops(elements: int, act: str, target: Target) -> float:
    """What the tensor cores could have done, in FLOP, while activations of that many elements are issued.

    Beside the activation an element takes the sum with the bias and half of a conversion to 16 bits. An SM issues 128
    lanes a clock; its tensor cores do 4096 FLOP (sm_90) or 2048 (sm_80) in that clock, in 16 bits.
    """
    return elements * (INSTRUCTIONS[act] + 1.5) * (32 if target.name in ("sm_90", "interpreter") else 16)


@triton.jit
def gelu(p):
    """`p Φ(p)`, the normal distribution function by erf: for fp32 results."""
    return 0.5 * p * (1.0 + tl.erf(p * 0.7071067811865476))


@triton.jit
def gelu_fp16(p):
    """`p Φ(p)` within 0.30 of half an ulp of fp16 for every finite p."""
    # gelu(p) = max(p, 0) - t Φ(-t), t = |p|, and log2 Φ(-t) is nearly a parabola: Φ(-t) = 2^q(t) needs one exp2 and
    # keeps the RELATIVE accuracy of the negative tail, which `1 + erf` cancels. q is the minimax polynomial of
    # log2 Φ(-t) on [0, 5.75] weighted by dtype: error of t 2^q over half an ulp of the result (Lawson's reweighted
    # least squares on a Chebyshev basis). Beyond 6 the result is below half of the least fp16 number.
    t = tl.minimum(tl.abs(p), 6.0)
    q = tl.fma(t, -0.000333233038, 0.00595060177)
    q = tl.fma(q, t, -0.048649881)
    q = tl.fma(q, t, -0.463567168)
    q = tl.fma(q, t, -1.14942992)
    q = tl.fma(q, t, -1.000103)
    h = 0.5 * p
    return (h + tl.abs(h)) - t * tl.exp2(q)  # the sum, not a maximum: it passes NaN on, and -inf as torch does


@triton.jit
def gelu_bf16(p):
    """`p Φ(p)` within 0.97 of half an ulp of bf16 for every finite p (results below 1.2e-38 are flushed to zero)."""
    # As above on [0, 13.15], where the result leaves the normal numbers: bf16 has fp32's range, so the tail is long.
    t = tl.minimum(tl.abs(p), 14.0)
    q = tl.fma(t, 3.45148146e-06, -0.000165752339)
    q = tl.fma(q, t, 0.00326369191)
    q = tl.fma(q, t, -0.0347177833)
    q = tl.fma(q, t, -0.493128121)
    q = tl.fma(q, t, -1.12738848)
    q = tl.fma(q, t, -1.00271392)
    h = 0.5 * p
    return (h + tl.abs(h)) - t * tl.exp2(q)


@triton.jit
def gelu_e4m3(p):
    """`p Φ(p)` within 0.11 of half an ulp of e4m3, for a row whose scale holds p: 416 scale >= |p|."""
    # As above, weighted by the steps that such a scale has: what lies below 2^-10 of it is rounded to zero, from 4.6 on
    # all of the tail.
    t = tl.minimum(tl.abs(p), 5.2)
    q = tl.fma(t, -0.01691008, -0.52821278)
    q = tl.fma(q, t, -1.10468433)
    q = tl.fma(q, t, -1.00465394)
    h = 0.5 * p
    return (h + tl.abs(h)) - t * tl.exp2(q)


@triton.jit
def gelu_tanh(p):
    """`½ p (1 + tanh(√(2/π) (p + 0.044715 p³)))`, written with the logistic function: `½ (1 + tanh u) = σ(2u)`."""
    # -2 log2(e) √(2/π) and 0.044715 times that: σ(2u) = 1 / (1 + 2^w)
    w = p * tl.fma(p * p, -0.10294324, -2.3022082)
    return p / (1.0 + tl.exp2(w))


@triton.jit
def silu(p):
    """`p σ(p)`."""
    return p / (1.0 + tl.exp2(-1.4426950408889634 * p))


@triton.jit
def sigmoid(p):
    """`1 / (1 + e^-p)`."""
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * p))


@triton.jit
def activate(p, ACT: tl.constexpr, dtype: tl.constexpr = tl.float32):
    """The activation of that name, p and the result in fp32; dtype is the one that the result is rounded to next."""
    if ACT == "gelu":
        if dtype == tl.float16:
            p = gelu_fp16(p)
        elif dtype == tl.bfloat16:
            p = gelu_bf16(p)
        elif dtype == tl.float8e4nv:
            p = gelu_e4m3(p)
        else:
            p = gelu(p)
    elif ACT == "gelu_tanh":
        p = gelu_tanh(p)
    elif ACT == "silu":
        p = silu(p)
    elif ACT == "sigmoid":
        p = sigmoid(p)
    elif ACT == "relu":
        p = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACT == "none", "unknown activation")
    return p
