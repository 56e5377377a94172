"""What a kernel has to beat: the dense layer, products with GELU in cuBLASLt's epilogue, and what torch.compile makes.

A rival of the op's own arguments starts with "torch", one of the dense layer with "dense", one of bf16 factors with
"four". The epilogue's GELU is the tanh form, cheaper than the exact one of the kernels: rivals get the benefit.
"dense fp8" is what quantisers make under torch.compile: rows rounded by their largest entry, `torch._scaled_mm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import calls
from vitlr.ops.layers import lowrank_mlp

Function = Callable[..., Any]


def dense_linear(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, W, b)


def dense_mlp(x: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, W1, b1)), W2, b2)


def dense_epilogue(x: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> Tensor:
    """Two products, the first with its GELU in the epilogue."""
    return F.linear(torch._addmm_activation(b1, x, W1.mT, use_gelu=True), W2, b2)


def torch_epilogue(
    x: Tensor, B1: Tensor, A1: Tensor, b1: Tensor, B2: Tensor, A2: Tensor, b2: Tensor, *_: Any
) -> Tensor:
    """Four products, the second with its GELU in the epilogue."""
    hidden = torch._addmm_activation(b1, F.linear(x, B1), A1.mT, use_gelu=True)
    return F.linear(F.linear(hidden, B2), A2, b2)


def dense_fp8(x: Tensor, W1: Tensor, s1: Tensor, b1: Tensor, W2: Tensor, s2: Tensor, b2: Tensor) -> Tensor:
    """The dense MLP by weights of e4m3 with a scale a row."""
    return _scaled(F.gelu(_scaled(x, W1, s1, b1)), W2, s2, b2)


def _scaled(x: Tensor, W: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    q, s = _rounded(x)
    return torch._scaled_mm(q, W.mT, s, scale.mT, bias=b, out_dtype=x.dtype, use_fast_accum=True)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3, and their scales [M, 1]."""
    s = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / 448
    return (x / s).to(torch.float8_e4m3fn), s


def takes(name: str, form: str) -> str:
    """What a rival takes: "own" arguments of the op, or those of a "linear", an "mlp", one in "fp8", or "factors"."""
    if name.startswith("torch"):
        return "own"
    return "factors" if name.startswith("four") else "fp8" if name.startswith("dense fp8") else form


def inputs(kind: str, op: str, args: tuple, device: torch.device) -> Callable[[int], tuple]:
    """`make(seed)` of what rivals of a call with these arguments take, by `takes`."""
    x, (K, *outs) = args[0], widths(op, args)
    M = len(x)

    def make(seed: int) -> tuple:
        new = calls.Random(seed, x.dtype, device)
        if kind == "factors":
            return calls.mlp(M, K, outs[1], outs[-1], outs[0], outs[2], x.dtype, device).make(seed)
        if kind == "linear":
            return new(M, K), new(outs[-1], K, fan_in=K), new(outs[-1])
        D, N = outs[1 if len(outs) == 4 else 0], outs[-1]
        if kind == "fp8":
            W1, W2 = (_rounded(new(n, k, fan_in=k)) for n, k in ((D, K), (N, D)))
            return new(M, K), *W1, new(D), *W2, new(N)
        return new(M, K), new(D, K, fan_in=K), new(D), new(N, D, fan_in=D), new(N)

    return make


def widths(op: str, args: tuple) -> tuple[int, ...]:
    """K, what each linear puts out, and N last."""
    K = args[0].shape[-1]
    if op.endswith("_chain"):
        return K, *(len(W) for W in args[1])
    if op == lowrank_mlp.OP:
        return K, *(len(W) for W in args[1:6] if W is not None and W.dim() == 2)
    return K, len(args[2])


def function(name: str, form: str, op: str, device: torch.device) -> Function:
    """A rival by its name. Raises KeyError for one that is not there."""
    dense = dense_mlp if form == "mlp" else dense_linear
    four = {"torch epilogue": torch_epilogue, "four epilogue": torch_epilogue}
    plain = {"dense": dense, "dense epilogue": dense_epilogue, **four}
    if name in plain:
        return plain[name]
    made = {"dense compiled": dense, "torch compiled": lowrank_mlp.reference, "dense fp8 compiled": dense_fp8}[name]
    # Compiled on a CPU only where the gate is rehearsed: there it is enough that it is traced.
    return torch.compile(made, fullgraph=True, dynamic=False, backend="inductor" if device.type == "cuda" else "eager")
