"""`y = A₂ (B₂ act(A₁ (B₁ x) + b₁)) + b₂ + residual`: a whole transformer MLP of low-rank linears as one operation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitlr.ops.dispatch import floors, registry
from vitlr.ops.dispatch.registration import register_layer_op
from vitlr.ops.layers.activations import ACTIVATIONS, check_activation
from vitlr.ops.layers.factors import Factors, Maybe, check, check_added, check_second, linear, weight_size

OP = "lowrank_mlp"


def reference(
    x: Tensor, B1: Tensor, A1: Maybe, b1: Maybe, B2: Tensor, A2: Maybe, b2: Maybe, residual: Maybe = None,
    act: str = "gelu",
) -> Tensor:  # fmt: skip
    """The specification, in plain torch."""
    h = ACTIVATIONS[act][0](linear(x, B1, A1, b1))  # [..., D]
    y = linear(h, B2, A2, b2)  # [..., N]
    return y if residual is None else y + residual


def lowrank_mlp(
    x: Tensor, B1: Tensor, A1: Maybe, b1: Maybe, B2: Tensor, A2: Maybe, b2: Maybe, residual: Maybe = None,
    act: str = "gelu",
) -> Tensor:  # fmt: skip
    """`y = A₂ (B₂ act(A₁ (B₁ x) + b₁)) + b₂ + residual`, act one of none, gelu, gelu_tanh, silu, sigmoid, relu.

    x [..., K], B1 [r1, K], A1 [D, r1], b1 [D], B2 [r2, D], A2 [N, r2], b2 [N] -> y [..., N], contiguous.
    A linear that stayed dense is its weight as B ([D, K] or [N, D]) and None as A; biases and residual may be None.
    Raises InputError for an unknown act and for shapes, dtypes or devices that do not fit.
    """
    return torch.ops.vitlr.lowrank_mlp.default(x, B1, A1, b1, B2, A2, b2, residual, act)


class Key(NamedTuple):
    """What dispatch knows of a call; r1 or r2 is None where that linear is dense, M while rows are unknown."""

    M: int | None
    K: int
    D: int
    N: int
    r1: int | None
    r2: int | None
    act: str = "gelu"
    residual: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def roofline(key: Key, ceilings: registry.Ceilings | None = None) -> registry.Roofline:
    """`2 M` FLOPs a weight over the compulsory bytes of x, y, residual, weights: the hidden [M, D] need never exist."""
    M, K, D, N = key.M or 0, key.K, key.D, key.N
    weights = weight_size(K, D, key.r1) + weight_size(D, N, key.r2)
    size = key.dtype.itemsize * (M * (K + N + key.residual * N) + weights)
    return registry.Roofline.of(2 * M * weights, size, key.dtype, ceilings)


def separate_floor(key: Key, ceilings: registry.Ceilings) -> float | None:
    """The floor in µs of separate products, an activation that reads and writes [M, D] once, and the residual's sum."""
    passes = 2 * key.D * (key.act != "none") + 3 * key.N * key.residual
    linears = [(key.K, key.D, key.r1), (key.D, key.N, key.r2)]
    return floors.separate(key.M or 0, linears, passes, key.dtype, ceilings)


def _describe(
    M: int | None, x: Tensor, B1: Tensor, A1: Maybe, b1: Maybe, B2: Tensor, A2: Maybe, b2: Maybe, residual: Maybe,
    act: str,
) -> Key:  # fmt: skip
    check_activation(OP, act)
    D = check(OP, x, ("B1", "A1", "b1"), B1, A1, b1)
    N = check_second(OP, x, D, B2, A2, b2)
    check_added(OP, x, N, residual)
    r1, r2 = None if A1 is None else B1.shape[0], None if A2 is None else B2.shape[0]
    return Key(M, x.shape[-1], D, N, r1, r2, act, residual is not None, x.dtype, x.device)


def _backward(
    g: Tensor, needs: tuple[bool, ...], x: Tensor, B1: Tensor, A1: Maybe, b1: Maybe, B2: Tensor, A2: Maybe, act: str
) -> tuple[Maybe, ...]:
    first, second = Factors(B1, A1, b1), Factors(B2, A2, None)
    activation, activation_gradient = ACTIVATIONS[act]
    # The hidden [M, D] is computed again: not keeping it is what the fused forward is for.
    p = first(x) if any(needs[:6]) else None
    h = None if p is None else activation(p)
    dh, *above = second.gradients(h, g, (any(needs[:4]), *needs[4:7]))
    below: tuple[Maybe, ...] = (None,) * 4
    if dh is not None and p is not None:
        below = first.gradients(x, activation_gradient(dh, p), needs[:4])
    return (*below, *above, g if needs[7] else None)


register_layer_op(
    "lowrank_mlp(Tensor x, Tensor B1, Tensor? A1, Tensor? b1, Tensor B2, Tensor? A2, Tensor? b2, Tensor? residual, "
    "str act) -> Tensor",
    reference,
    key=Key,
    describe=_describe,
    roofline=roofline,
    saved=lambda needs, *given: given[:6],
    backward=_backward,
    floor=separate_floor,
)
