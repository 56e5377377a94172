"""Linears of 8-bit floats in a row, each `y = act(s (scale ⊙ (W q)) + b)` with `q = e4m3(x / s)`, s a scale a row.

    W [N, K]       codes in float8_e4m3fn, products summed in fp32
    scale, b [N]   fp32: the scale of row n of W, and a bias or None
    reach [2]      fp32: the largest norm of a row of `scale ⊙ W`, and the largest |b|

Scales of rows are powers of two, so that to divide by one rounds nothing, and are known before the product: for every
activation but the sigmoid, which ends at 1, `|act(p)| <= |p| <= ‖x‖ reach₀ + reach₁`, in fp32 for rows of size 1e-18 to
1e18. The first row's is its largest entry. Nothing is measured beforehand: no images, no ranges. A LayerNorm may stand
before all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.registration import register_running_op
from vitlr.ops.layers.activations import ACTIVATIONS, check_activation
from vitlr.ops.layers.factors import Maybe, check_added
from vitlr.ops.layers.int8_chain import Norm, check_norm

OP = "fp8_chain"
FP8 = torch.float8_e4m3fn
LARGEST = 416  # of a row over its scale: e4m3 ends at 448, and a row that was rounded once may be 1/16 longer


class Step(NamedTuple):
    """One linear of 8-bit floats."""

    codes: Tensor
    scale: Tensor
    bias: Maybe
    reach: Tensor


def scale_of(reach: Tensor) -> Tensor:
    """The least powers of two with `416 scale >= reach`, in fp32; a reach of 0 counts as 4e-28."""
    bits = (reach.float() * (1 / LARGEST)).clamp_min(1e-30).view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def step_of(W: Tensor, bias: Maybe) -> Step:
    """The step nearest to `W x + b`: every row of W [N, K] rounded to e4m3 by a scale of its own."""
    W = W.detach().float()
    scale = scale_of(W.abs().amax(1))
    codes = (W / scale[:, None]).to(FP8)
    bias = None if bias is None else bias.detach().float()
    return Step(codes, scale, bias, reach_of(codes, scale, bias))


def reach_of(codes: Tensor, scale: Tensor, bias: Maybe) -> Tensor:
    """How far a linear carries: the largest norm of a row of `scale ⊙ W`, and the largest |b|."""
    rows = torch.linalg.vector_norm(codes.float(), dim=1) * scale
    return torch.stack([rows.amax(), rows.new_zeros(()) if bias is None else bias.abs().amax()])


def reference(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Maybe], reaches: Sequence[Tensor],
    residual: Maybe, acts: Sequence[str], norm: Sequence[Tensor] = (), eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """The specification, in plain torch, in fp32; in fp64, where x is, without the rounding of rows: what is meant."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if norm:
        gamma, beta = (t.to(dtype) for t in norm)
        y = F.layer_norm(y, y.shape[-1:], gamma, beta, eps)
    reach = y.abs().amax(-1, keepdim=True)
    for W, scale, bias, (rows, most), act in zip(codes, scales, biases, reaches, acts, strict=True):
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        s = scale_of(reach).to(dtype)
        q = y / s if dtype == torch.float64 else (y / s).to(FP8).to(dtype)
        p = F.linear(q, W.to(dtype)) * s * scale.to(dtype)
        y = ACTIVATIONS[act][0](p if bias is None else p + bias.to(dtype))
        reach = torch.ones_like(length) if act == "sigmoid" else length * rows + most
    return (y if residual is None else y + residual.to(dtype)).to(x.dtype)


def fp8_chain(
    x: Tensor, steps: Sequence[Step], acts: Sequence[str], residual: Tensor | None = None, norm: Norm | None = None
) -> Tensor:
    """x [..., K], or `norm` of it, through linears, `act(s (scale ⊙ (W q)) + b)` each, + residual -> y [..., N].

    y has x's dtype. `acts`: one for each step, of none, gelu, gelu_tanh, silu, sigmoid, relu. There is no gradient:
    asking for one raises InputError, as do an unknown act and shapes, dtypes or devices that do not fit.
    """
    columns = [list(column) for column in zip(*steps, strict=True)]
    gamma_beta, eps = ([], 0.0) if norm is None else ([norm.gamma, norm.beta], norm.eps)
    return _call(x, *columns, residual, list(acts), gamma_beta, eps)


class Key(NamedTuple):
    """What dispatch knows of a call: `widths` are K, what each step puts out, and N last; M is None while unknown."""

    M: int | None
    widths: tuple[int, ...]
    acts: tuple[str, ...]
    residual: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    normed: bool = False


def roofline(key: Key, ceilings: registry.Ceilings | None = None) -> registry.Roofline:
    """`2 M` operations a weight over the bytes of x, y, residual and a byte a weight."""
    M, K, N = key.M or 0, key.widths[0], key.widths[-1]
    weights = sum(k * n for k, n in pairwise(key.widths))
    size = key.dtype.itemsize * M * (K + N + key.residual * N) + weights
    return registry.Roofline.of(2 * M * weights, size, FP8, ceilings)


def check_step(name: str, step: Step, K: int, x: Tensor) -> None:
    """Raise `InputError` unless a step takes K columns."""
    W = step.codes
    if W.dtype != FP8 or W.dim() != 2 or W.shape[1] != K or K == 0:
        raise InputError(f"{name}: codes are {W.dtype} {list(W.shape)}, expected {FP8} [N, {K}], K above 0")
    for part, shape in (("scale", W.shape[:1]), ("bias", W.shape[:1]), ("reach", (2,))):
        t = getattr(step, part)
        if t is not None and (t.dtype != torch.float32 or t.shape != shape):
            raise InputError(f"{name}: {part} is {t.dtype} {list(t.shape)}, expected torch.float32 {list(shape)}")
    if any(t is not None and t.device != x.device for t in step):
        raise InputError(f"{name} is on {W.device}, x on {x.device}")


def _describe(
    M: int | None, x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Maybe],
    reaches: Sequence[Tensor], residual: Maybe, acts: Sequence[str], norm: Sequence[Tensor], eps: float,
) -> Key:  # fmt: skip
    if x.dim() == 0 or not x.is_floating_point():
        raise InputError(f"{OP}: x is {x.dtype} {list(x.shape)}, expected floating point [..., K]")
    if not len(codes) == len(scales) == len(biases) == len(reaches) == len(acts) > 0:
        raise InputError(f"{OP}: {len(codes)} codes and {len(acts)} acts, expected as many of each, and one at least")
    widths = [x.shape[-1]]
    for i, (act, *parts) in enumerate(zip(acts, codes, scales, biases, reaches, strict=True)):
        check_activation(OP, act)
        check_step(f"{OP}: step {i}", Step(*parts), widths[-1], x)  # type: ignore[arg-type]
        widths.append(codes[i].shape[0])
    check_norm(OP, x, norm, eps)
    check_added(OP, x, widths[-1], residual)
    return Key(M, tuple(widths), tuple(acts), residual is not None, x.dtype, x.device, bool(norm))


_call = register_running_op(
    "fp8_chain(Tensor x, Tensor[] codes, Tensor[] scales, Tensor?[] biases, Tensor[] reaches, Tensor? residual, "
    "str[] acts, Tensor[] norm, float eps) -> Tensor",
    reference,
    key=Key,
    describe=_describe,
    roofline=roofline,
)
