"""`y = act(A (B x) + b) + residual`: two thin linears and what follows them as one operation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlr.ops.dispatch import floors, registry
from vitlr.ops.dispatch.registration import register_layer_op
from vitlr.ops.layers.activations import ACTIVATIONS, check_activation
from vitlr.ops.layers.factors import Factors, Maybe, check, check_added

OP = "lowrank_linear"


def reference(x: Tensor, B: Tensor, A: Tensor, bias: Maybe = None, residual: Maybe = None, act: str = "none") -> Tensor:
    """The specification, in plain torch."""
    t = F.linear(x, B)  # [..., r]
    y = ACTIVATIONS[act][0](F.linear(t, A, bias))  # [..., N]
    return y if residual is None else y + residual


def lowrank_linear(
    x: Tensor, B: Tensor, A: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, act: str = "none"
) -> Tensor:
    """`y = act((x Bᵀ) Aᵀ + b) + residual`, act one of none, gelu, gelu_tanh, silu, sigmoid, relu.

    x [..., K], B [r, K], A [N, r], bias [N] or None, residual [..., N] or None -> y [..., N], contiguous.
    Differentiable in every tensor; runs what `vitlr.ops.explain("lowrank_linear", ...)` names.
    Raises InputError for an unknown act and for shapes, dtypes or devices that do not fit.
    """
    return torch.ops.vitlr.lowrank_linear.default(x, B, A, bias, residual, act)


class Key(NamedTuple):
    """What dispatch knows of a call; M is None while a graph with unknown rows is traced."""

    M: int | None
    K: int
    N: int
    r: int
    bias: bool = True
    act: str = "none"
    residual: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def roofline(key: Key, ceilings: registry.Ceilings | None = None) -> registry.Roofline:
    """`2 M r (K + N)` FLOPs over the compulsory bytes of x, y, A, B and a residual: the floor of one fused pass."""
    M, K, N, r = key.M or 0, key.K, key.N, key.r
    size = key.dtype.itemsize * ((M + r) * (K + N) + key.residual * M * N)
    return registry.Roofline.of(2 * M * r * (K + N), size, key.dtype, ceilings)


def two_gemms_floor(key: Key, ceilings: registry.Ceilings) -> float | None:
    """The floor of two separate products in µs: the intermediate [M, r] is written and read once more."""
    # An activation reads and writes [M, N] once more, a residual reads two of that size and writes one.
    passes = (2 * (key.act != "none") + 3 * key.residual) * key.N
    return floors.separate(key.M or 0, [(key.K, key.N, key.r)], passes, key.dtype, ceilings)


def _describe(M: int | None, x: Tensor, B: Tensor, A: Tensor, bias: Maybe, residual: Maybe, act: str) -> Key:
    check_activation(OP, act)
    N = check(OP, x, ("B", "A", "bias"), B, A, bias)
    check_added(OP, x, N, residual)
    return Key(M, x.shape[-1], N, B.shape[0], bias is not None, act, residual is not None, x.dtype, x.device)


def _saved(
    needs: tuple[bool, ...], x: Tensor, B: Tensor, A: Tensor, bias: Maybe, _: Maybe, act: str
) -> tuple[Maybe, ...]:
    # x is the large one: frozen factors must not keep it alive, unless the activation's gradient asks for it.
    active = act != "none"
    return x if active or needs[1] or needs[2] else None, B, A, bias if active else None


def _backward(g: Tensor, needs: tuple[bool, ...], x: Any, B: Tensor, A: Tensor, bias: Maybe, act: str) -> tuple:
    linear, dp = Factors(B, A, bias), g
    if act != "none" and any(needs[:4]):
        dp = ACTIVATIONS[act][1](g, linear(x))
    return (*linear.gradients(x, dp, needs[:4]), g if needs[4] else None)


register_layer_op(
    "lowrank_linear(Tensor x, Tensor B, Tensor A, Tensor? bias, Tensor? residual, str act) -> Tensor",
    reference,
    key=Key,
    describe=_describe,
    roofline=roofline,
    saved=_saved,
    backward=_backward,
    floor=two_gemms_floor,
)
