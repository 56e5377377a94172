"""Activations inside kernels, on fp32 values."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(p):
    """`p Φ(p)`, the normal distribution function by erf."""
    return 0.5 * p * (1.0 + tl.erf(p * 0.7071067811865476))


@triton.jit
def gelu_tanh(p):
    """`½ p (1 + tanh(√(2/π) (p + 0.044715 p³)))`, written with the logistic function: `½ (1 + tanh u) = σ(2u)`."""
    return p * tl.sigmoid(1.5957691216057308 * (p + 0.044715 * p * p * p))


@triton.jit
def activate(p, ACT: tl.constexpr):
    """The activation of that name; p and the result in fp32."""
    if ACT == "gelu":
        p = gelu(p)
    elif ACT == "gelu_tanh":
        p = gelu_tanh(p)
    elif ACT == "silu":
        p = p * tl.sigmoid(p)
    elif ACT == "relu":
        p = tl.where(p < 0.0, 0.0, p)  # NaN stays NaN
    else:
        tl.static_assert(ACT == "none", "unknown activation")
    return p
