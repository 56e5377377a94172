"""`y = A₂ (B₂ (act(A_g (B_g x) + b_g) ∘ (A_v (B_v x) + b_v))) + b₂ + residual`: a gated MLP of low-rank linears."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import floors, registry
from vitlr.ops.dispatch.registration import register_layer_op
from vitlr.ops.layers.activations import ACTIVATIONS, check_activation
from vitlr.ops.layers.factors import Factors, Maybe, check, check_added, check_second, linear, weight_size

OP = "lowrank_glu"


def reference(
    x: Tensor, Bg: Tensor, Ag: Maybe, bg: Maybe, Bv: Tensor, Av: Maybe, bv: Maybe, B2: Tensor, A2: Maybe, b2: Maybe,
    residual: Maybe = None, act: str = "silu",
) -> Tensor:  # fmt: skip
    """The specification, in plain torch."""
    h = ACTIVATIONS[act][0](linear(x, Bg, Ag, bg)) * linear(x, Bv, Av, bv)  # [..., D]
    y = linear(h, B2, A2, b2)  # [..., N]
    return y if residual is None else y + residual


def lowrank_glu(
    x: Tensor, Bg: Tensor, Ag: Maybe, bg: Maybe, Bv: Tensor, Av: Maybe, bv: Maybe, B2: Tensor, A2: Maybe, b2: Maybe,
    residual: Maybe = None, act: str = "silu",
) -> Tensor:  # fmt: skip
    """`y = A₂ (B₂ (act(A_g (B_g x) + b_g) ∘ (A_v (B_v x) + b_v))) + b₂ + residual`, act as in `lowrank_mlp`.

    x [..., K], Bg [rg, K], Ag [D, rg], bg [D], Bv [rv, K], Av [D, rv], bv [D], B2 [r2, D], A2 [N, r2], b2 [N],
    residual [..., N] -> y [..., N], contiguous. A linear that stayed dense is its weight as B and None as A; biases
    and residual may be None. One tensor as Bg and Bv, as for the halves of a packed fc1, is multiplied once.
    Raises InputError for an unknown act and for shapes, dtypes or devices that do not fit.
    """
    return torch.ops.vitlr.lowrank_glu.default(x, Bg, Ag, bg, Bv, Av, bv, B2, A2, b2, residual, act)


class Key(NamedTuple):
    """What dispatch knows of a call; a rank is None where that linear is dense, M while rows are unknown.

    `shared`: gate and value have one B, as the halves of a packed low-rank fc1 do.
    """

    M: int | None
    K: int
    D: int
    N: int
    rg: int | None
    rv: int | None
    r2: int | None
    shared: bool = False
    act: str = "silu"
    residual: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def roofline(key: Key, ceilings: registry.Ceilings | None = None) -> registry.Roofline:
    """`2 M` FLOPs a weight over the compulsory bytes of x, y, residual, weights; a shared B counts once in both."""
    M, K, D, N = key.M or 0, key.K, key.D, key.N
    weights = weight_size(K, D, key.rg) + weight_size(K, D, key.rv) + weight_size(D, N, key.r2)
    weights -= (key.rg or 0) * K * key.shared
    size = key.dtype.itemsize * (M * (K + N + key.residual * N) + weights)
    return registry.Roofline.of(2 * M * weights, size, key.dtype, ceilings)


def separate_floor(key: Key, ceilings: registry.Ceilings) -> float | None:
    """The floor in µs of separate products, of the gating's two passes over [M, D], and of the residual's sum."""
    linears = [(key.K, key.D, key.rg), (key.K, key.D, key.rv), (key.D, key.N, key.r2)]
    passes = (2 * (key.act != "none") + 3) * key.D + 3 * key.N * key.residual
    return floors.separate(key.M or 0, linears, passes, key.dtype, ceilings)


def _describe(
    M: int | None, x: Tensor, Bg: Tensor, Ag: Maybe, bg: Maybe, Bv: Tensor, Av: Maybe, bv: Maybe, B2: Tensor,
    A2: Maybe, b2: Maybe, residual: Maybe, act: str,
) -> Key:  # fmt: skip
    check_activation(OP, act)
    D = check(OP, x, ("Bg", "Ag", "bg"), Bg, Ag, bg)
    width = check(OP, x, ("Bv", "Av", "bv"), Bv, Av, bv)
    if width != D:
        raise InputError(f"{OP}: gate and value do not fit, they are {D} and {width} wide")
    N = check_second(OP, x, D, B2, A2, b2)
    check_added(OP, x, N, residual)
    rg, rv, r2 = (None if A is None else B.shape[0] for B, A in ((Bg, Ag), (Bv, Av), (B2, A2)))
    shared = M is not None and rg is not None and rv is not None and _same(Bg, Bv)
    return Key(M, x.shape[-1], D, N, rg, rv, r2, shared, act, residual is not None, x.dtype, x.device)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one memory seen in one way."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _backward(
    g: Tensor, needs: tuple[bool, ...], x: Tensor, Bg: Tensor, Ag: Maybe, bg: Maybe, Bv: Tensor, Av: Maybe, bv: Maybe,
    B2: Tensor, A2: Maybe, act: str,
) -> tuple[Maybe, ...]:  # fmt: skip
    gate, value, second = Factors(Bg, Ag, bg), Factors(Bv, Av, bv), Factors(B2, A2, None)
    activation, activation_gradient = ACTIVATIONS[act]
    below: tuple[Maybe, ...] = (None,) * 7
    if not any(needs[:9]):
        return (*below, *second.gradients(None, g, (False, *needs[7:10]))[1:], g if needs[10] else None)
    # Gate and value [M, D] are computed again: not keeping them is what the fused forward is for.
    p, v = gate(x), value(x)
    a = activation(p)
    dh, *above = second.gradients(a * v, g, (any(needs[:7]), *needs[7:10]))
    if dh is not None:
        dx, *of_gate = gate.gradients(x, activation_gradient(dh * v, p), needs[:4])
        more, *of_value = value.gradients(x, dh * a, (needs[0], *needs[4:7]))
        below = (None if dx is None or more is None else dx + more, *of_gate, *of_value)
    return (*below, *above, g if needs[10] else None)


register_layer_op(
    "lowrank_glu(Tensor x, Tensor Bg, Tensor? Ag, Tensor? bg, Tensor Bv, Tensor? Av, Tensor? bv, Tensor B2, "
    "Tensor? A2, Tensor? b2, Tensor? residual, str act) -> Tensor",
    reference,
    key=Key,
    describe=_describe,
    roofline=roofline,
    saved=lambda needs, *given: given[:9],
    backward=_backward,
    floor=separate_floor,
)
