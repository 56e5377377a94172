"""What a kernel has to beat: the dense layer, products with GELU in cuBLASLt's epilogue, and what torch.compile makes.

A rival of the op's own arguments starts with "torch", one of the dense layer with "dense". The epilogue's GELU is the
tanh form, cheaper than the exact one of the kernels: rivals get the benefit.
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


def inputs(form: str, args: tuple, device: torch.device) -> Callable[[int], tuple]:
    """`make(seed)` of the dense layer that a low-rank call with these arguments replaces: of a "linear" or an "mlp"."""
    x = args[0]

    def make(seed: int) -> tuple:
        new = calls.Random(seed, x.dtype, device)
        (M, K), N = x.shape, args[2].shape[0]
        if form == "linear":
            return new(M, K), new(N, K, fan_in=K), new(N)
        D, N = N, args[5].shape[0]
        return new(M, K), new(D, K, fan_in=K), new(D), new(N, D, fan_in=D), new(N)

    return make


def function(name: str, form: str, op: str, device: torch.device) -> Function:
    """A rival by its name. Raises KeyError for one that is not there."""
    dense = dense_mlp if form == "mlp" else dense_linear
    plain = {"dense": dense, "dense epilogue": dense_epilogue, "torch epilogue": torch_epilogue}
    if name in plain:
        return plain[name]
    if name not in ("dense compiled", "torch compiled"):
        raise KeyError(name)
    made = dense if name.startswith("dense") else lowrank_mlp.reference
    # Compiled on a CPU only where the gate is rehearsed: there it is enough that it is traced.
    return torch.compile(made, fullgraph=True, dynamic=False, backend="inductor" if device.type == "cuda" else "eager")
