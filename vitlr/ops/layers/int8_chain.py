"""Linears of integers in a row, each `y = act(scale ⊙ (W q) + b)` with `q = round(multiplier ⊙ x + shift)` in u8.

    W [N, K]             codes in int8, exact sums in int32
    scale, b [N]         fp32: the step of row n of W q, and a bias that holds what the shifts add
    multiplier, shift [K]    fp32: column k of x is (q - shift) / multiplier, for q from 0 to 255

So each column has a step and a zero point of its own, which cost nothing: they are applied where the input is read, or
where the layer before writes it. A channel of x that 255 steps do not suit is read by several columns: `wide` [R] int32
are the channels, in rising order, that the last R of the K columns read again. With the same multiplier and codes and a
shift that is less by 255, such a column counts on where the one before ended.
A linear is one step, a linear of low rank two, an MLP two to four. A LayerNorm may stand before all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.registration import Ready, register_running_op
from vitlr.ops.layers.activations import ACTIVATIONS, check_activation
from vitlr.ops.layers.factors import Maybe, check_added

OP = "int8_chain"
LARGEST = 255  # of q
LIMIT = 65536  # of K: 255 * 127 * K is below 2^31


class Step(NamedTuple):
    """One linear of integers."""

    codes: Tensor
    scale: Tensor
    bias: Tensor
    multiplier: Tensor
    shift: Tensor
    wide: Maybe = None

    @property
    def channels(self) -> int:
        """Of x, each of which has a column, and some have several."""
        return self.codes.shape[-1] - (0 if self.wide is None else len(self.wide))


class Norm(NamedTuple):
    """`gamma ⊙ (x - mean) / sqrt(variance + eps) + beta` over the K channels of x; gamma, beta [K] in x's dtype."""

    gamma: Tensor
    beta: Tensor
    eps: float


def reference(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor],
    multipliers: Sequence[Tensor], shifts: Sequence[Tensor], wides: Sequence[Maybe], residual: Maybe,
    acts: Sequence[str], norm: Sequence[Tensor] = (), eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """The specification, in plain torch: fp32, or fp64 where x is."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if norm:
        gamma, beta = (t.to(dtype) for t in norm)
        y = F.layer_norm(y, y.shape[-1:], gamma, beta, eps)
    for parts in zip(codes, scales, biases, multipliers, shifts, wides, acts, strict=True):
        step, act = Step(*parts[:-1]), parts[-1]
        y = y if step.wide is None else torch.cat([y, y[..., step.wide]], -1)
        q = (y * step.multiplier.to(dtype) + step.shift.to(dtype)).round().clamp(0, LARGEST)
        y = ACTIVATIONS[act][0](F.linear(q, step.codes.to(dtype)) * step.scale.to(dtype) + step.bias.to(dtype))
    return (y if residual is None else y + residual.to(dtype)).to(x.dtype)


def int8_chain(
    x: Tensor, steps: Sequence[Step], acts: Sequence[str], residual: Tensor | None = None, norm: Norm | None = None
) -> Tensor:
    """x [..., K], or `norm` of it, through linears, `act(scale ⊙ (W q) + b)` each, + residual -> y [..., N].

    y has x's dtype. `acts`: one for each step, of none, gelu, gelu_tanh, silu, sigmoid, relu. A NaN in x counts as
    q = 0. There is no gradient: asking for one raises InputError, as do an unknown act and shapes, dtypes or devices
    that do not fit.
    """
    return _call(x, *_rest(steps, acts, residual, norm))


def ready(x: Tensor, *rest: Any) -> Ready | None:
    """Calls of `int8_chain` with these arguments, for x and residuals like these, if there is a short way."""
    return _call.ready(x, *_rest(*rest))


def _rest(
    steps: Sequence[Step], acts: Sequence[str], residual: Tensor | None = None, norm: Norm | None = None
) -> tuple:
    columns = [list(column) for column in zip(*steps, strict=True)]
    gamma_beta, eps = ([], 0.0) if norm is None else ([norm.gamma, norm.beta], norm.eps)
    return *columns, residual, list(acts), gamma_beta, eps


class Key(NamedTuple):
    """What dispatch knows of a call: `widths` are K, what each step puts out, and N last; M is None while unknown.

    `more`: how many columns each step has beside those.
    """

    M: int | None
    widths: tuple[int, ...]
    acts: tuple[str, ...]
    residual: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    more: tuple[int, ...] = ()
    normed: bool = False

    @property
    def weights(self) -> int:
        """Elements of all W."""
        more = self.more or (0,) * len(self.acts)
        return sum((K + R) * N for (K, N), R in zip(pairwise(self.widths), more, strict=True))


def roofline(key: Key, ceilings: registry.Ceilings | None = None) -> registry.Roofline:
    """`2 M` operations a weight over the bytes of x, y, residual and a byte a weight."""
    M, K, N = key.M or 0, key.widths[0], key.widths[-1]
    size = key.dtype.itemsize * M * (K + N + key.residual * N) + key.weights
    return registry.Roofline.of(2 * M * key.weights, size, torch.int8, ceilings)


def check_steps(op: str, x: Tensor, K: int, steps: Sequence[Step]) -> tuple[list[int], list[int]]:
    """What steps make of K channels, [K, ..., N], and their further columns; `InputError` where they do not fit."""
    widths, more = [K], []
    for i, step in enumerate(steps):
        W, *_, wide = step
        if wide is not None and (wide.dtype != torch.int32 or wide.dim() != 1 or len(wide) == 0):
            raise InputError(f"{op}: wide {i} is {wide.dtype} {list(wide.shape)}, expected torch.int32 [R], or None")
        more.append(0 if wide is None else len(wide))
        K = widths[-1] + more[-1]
        if W.dtype != torch.int8 or W.dim() != 2 or W.shape[1] != K or not 0 < K <= LIMIT:
            raise InputError(f"{op}: codes {i} are {W.dtype} {list(W.shape)}, expected int8 [N, {K}], K up to {LIMIT}")
        N, K = W.shape
        for name, size in (("scale", N), ("bias", N), ("multiplier", K), ("shift", K)):
            t = getattr(step, name)
            if t.dtype != torch.float32 or t.shape != (size,):
                raise InputError(f"{op}: {name} {i} is {t.dtype} {list(t.shape)}, expected torch.float32 [{size}]")
        if any(t is not None and t.device != x.device for t in step):
            raise InputError(f"{op}: step {i} is on {W.device}, x on {x.device}")
        widths.append(N)
    return widths, more


def check_norm(op: str, x: Tensor, norm: Sequence[Tensor], eps: float) -> None:
    """Raise `InputError` unless `norm` is gamma and beta for the channels of x, or nothing."""
    if len(norm) not in (0, 2):
        raise InputError(f"{op}: norm has {len(norm)} tensors, expected gamma and beta, or none")
    for name, t in zip(("gamma", "beta"), norm, strict=False):
        if t.shape != x.shape[-1:] or t.dtype != x.dtype or t.device != x.device:
            found = f"{t.dtype} {list(t.shape)} on {t.device}"
            raise InputError(f"{op}: {name} is {found}, expected {x.dtype} {list(x.shape[-1:])} on {x.device}")
    if not 0 <= eps < math.inf:
        raise InputError(f"{op}: eps is {eps}, expected 0 or more")


def _describe(
    M: int | None, x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor],
    multipliers: Sequence[Tensor], shifts: Sequence[Tensor], wides: Sequence[Maybe], residual: Maybe,
    acts: Sequence[str], norm: Sequence[Tensor], eps: float,
) -> Key:  # fmt: skip
    if x.dim() == 0 or not x.is_floating_point():
        raise InputError(f"{OP}: x is {x.dtype} {list(x.shape)}, expected floating point [..., K]")
    if not len(codes) == len(scales) == len(biases) == len(multipliers) == len(shifts) == len(wides) == len(acts) > 0:
        raise InputError(f"{OP}: {len(codes)} codes and {len(acts)} acts, expected as many of each, and one at least")
    for act in acts:
        check_activation(OP, act)
    steps = [Step(*parts) for parts in zip(codes, scales, biases, multipliers, shifts, wides, strict=True)]
    widths, more = check_steps(OP, x, x.shape[-1], steps)
    check_norm(OP, x, norm, eps)
    check_added(OP, x, widths[-1], residual)
    return Key(M, tuple(widths), tuple(acts), residual is not None, x.dtype, x.device, tuple(more), bool(norm))


_call = register_running_op(
    "int8_chain(Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] biases, Tensor[] multipliers, Tensor[] shifts, "
    "Tensor?[] wides, Tensor? residual, str[] acts, Tensor[] norm, float eps) -> Tensor",
    reference,
    key=Key,
    describe=_describe,
    roofline=roofline,
)
