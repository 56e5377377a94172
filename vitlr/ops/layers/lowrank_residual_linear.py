"""`y = A (B x) + R x + b`: a low-rank linear and a compact residual, in one pass over x."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.registration import register_layer_op
from vitlr.ops.layers.codes import FORMS, FP8, code_dtype, code_shape, decode, dequantise, groups
from vitlr.ops.layers.factors import Factors, Maybe, check

OP = "lowrank_residual_linear"


def reference(
    x: Tensor, B: Tensor, A: Tensor, R: Tensor, scale: Tensor | None, bias: Tensor | None, form: str, group_size: int
) -> Tensor:
    """The specification, in plain torch."""
    y = F.linear(F.linear(x, B), A, bias)  # [..., N]
    return y + residual(x, R, scale, form, group_size)


def residual(x: Tensor, R: Tensor, scale: Tensor | None, form: str, group_size: int) -> Tensor:
    """`x Rᵀ` [..., N] for x [..., K]."""
    if form == "blockdiag":
        return torch.einsum("...bk,bnk->...bn", x.unflatten(-1, (-1, group_size)), R).flatten(-2)
    return F.linear(x, dequantise(R, scale, form, group_size, x.shape[-1]))


def lowrank_residual_linear(
    x: Tensor,
    B: Tensor,
    A: Tensor,
    R: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    form: str = "int8",
    group_size: int = 64,
) -> Tensor:
    """`y = (x Bᵀ) Aᵀ + x Rᵀ + b`, R stored as one of int8, int4, fp8, blockdiag (`vitlr.ops.layers.codes` says how).

    x [..., K], B [r, K], A [N, r], bias [N] or None -> y [..., N], contiguous. int8: R int8 [N, K]; int4: R uint8
    [N, ⌈K/2⌉]; fp8: R float8_e4m3fn [N, K], or its bits as uint8; these with scale [N, ⌈K/group_size⌉] in x's dtype.
    blockdiag: R [nb, N/nb, K/nb] in x's dtype, no scale, group_size = K/nb.
    Differentiable in x, B, A, bias, scale and a block-diagonal R; runs what `vitlr.ops.explain` names.
    Raises InputError for an unknown form and for shapes, dtypes or devices that do not fit.
    """
    if form == "fp8" and R.dtype == FP8:
        R = R.view(torch.uint8)
    return torch.ops.vitlr.lowrank_residual_linear.default(x, B, A, R, scale, bias, form, group_size)


class Key(NamedTuple):
    """What dispatch knows of a call; M is None while a graph with unknown rows is traced."""

    M: int | None
    K: int
    N: int
    r: int
    form: str
    group_size: int
    bias: bool = True
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def _residual_size(K: int, N: int, form: str, group_size: int) -> int:
    """Entries of R that may differ from zero: multiplications a row."""
    return N * group_size if form == "blockdiag" else N * K


def roofline(key: Key, ceilings: registry.Ceilings | None = None) -> registry.Roofline:
    """`2 M (r (K + N) + |R|)` FLOPs over the compulsory bytes of x, y, A, B, the stored R and its scales."""
    M, K, N, r, form, group_size = key.M or 0, key.K, key.N, key.r, key.form, key.group_size
    flops = 2 * M * (r * (K + N) + _residual_size(K, N, form, group_size))
    codes = math.prod(code_shape(form, N, K, group_size)) * code_dtype(form, key.dtype).itemsize
    scales = 0 if form == "blockdiag" else N * groups(K, group_size)
    size = key.dtype.itemsize * ((M + r) * (K + N) + scales) + codes
    return registry.Roofline.of(flops, size, key.dtype, ceilings)


def separate_floor(key: Key, ceilings: registry.Ceilings) -> float | None:
    """The floor in µs of separate steps: shrink, expand, R written out, `R x`, and the sum of both outputs."""
    M, K, N, size = key.M or 0, key.K, key.N, key.dtype.itemsize
    R = _residual_size(K, N, key.form, key.group_size)
    products = [
        (M * key.r * K, M * (K + key.r) + key.r * K),  # multiplications, entries moved
        (M * N * key.r, M * (N + key.r) + N * key.r),
        (M * R, M * (K + N) + R),
    ]
    steps = [ceilings.microseconds(2 * macs, size * entries, key.dtype) for macs, entries in products]
    moved = 3 * M * N * size
    if key.form != "blockdiag":
        codes = code_shape(key.form, N, K, key.group_size)
        moved += codes[0] * codes[1] + R * size
    steps.append(1e6 * moved / ceilings.bytes_per_s)
    return None if None in steps else sum(step for step in steps if step is not None)


def check_form(op: str, N: int, K: int, form: str, group_size: int) -> None:
    """Raises InputError unless a residual [N, K] can be stored in that form."""
    if form not in FORMS:
        raise InputError(f"{op}: unknown form {form!r} of the residual, expected one of {', '.join(FORMS)}")
    if group_size < 1:
        raise InputError(f"{op}: group_size {group_size}, expected 1 or more")
    if form == "blockdiag" and (K % group_size or N % (K // group_size)):
        raise InputError(
            f"{op}: no blocks of {group_size} columns fit R {N}x{K}, expected group_size to divide K = {K} and "
            f"K / group_size to divide N = {N}"
        )


def check_residual(op: str, x: Tensor, N: int, R: Tensor, scale: Tensor | None, form: str, group_size: int) -> None:
    """Raises InputError unless R and its scale are those of an [N, K] residual for x [..., K]."""
    K = x.shape[-1]
    check_form(op, N, K, form, group_size)
    shape, dtype = list(code_shape(form, N, K, group_size)), code_dtype(form, x.dtype)
    if list(R.shape) != shape or R.dtype != dtype or R.device != x.device:
        raise InputError(
            f"{op}: R is {list(R.shape)} {R.dtype} on {R.device}, "
            f"expected {shape} {dtype} on {x.device} for form {form!r} and group_size {group_size}"
        )
    if form == "blockdiag":
        if scale is not None:
            raise InputError(f"{op}: form 'blockdiag' has no scale, got {list(scale.shape)}; pass None")
        return
    expected = [N, groups(K, group_size)]
    if scale is None:
        raise InputError(f"{op}: form {form!r} needs a scale {expected}, got None")
    if list(scale.shape) != expected or scale.dtype != x.dtype or scale.device != x.device:
        raise InputError(
            f"{op}: scale is {list(scale.shape)} {scale.dtype} on {scale.device}, "
            f"expected {expected} {x.dtype} on {x.device}"
        )


def _describe(
    M: int | None, x: Tensor, B: Tensor, A: Tensor, R: Tensor, scale: Maybe, bias: Maybe, form: str, group_size: int
) -> Key:
    N = check(OP, x, ("B", "A", "bias"), B, A, bias)
    check_residual(OP, x, N, R, scale, form, group_size)
    return Key(M, x.shape[-1], N, B.shape[0], form, group_size, bias is not None, x.dtype, x.device)


def _saved(needs: tuple[bool, ...], x: Tensor, *rest: Any) -> tuple[Maybe, ...]:
    # x is the large one: a frozen layer must not keep it alive.
    return x if any(needs[1:5]) else None, *rest[:4]


def _backward(
    g: Tensor,
    needs: tuple[bool, ...],
    x: Any,
    B: Tensor,
    A: Tensor,
    R: Tensor,
    scale: Maybe,
    form: str,
    group_size: int,
) -> tuple[Maybe, ...]:
    K, (needs_R, needs_scale, needs_bias) = B.shape[1], needs[3:6]
    dx, dB, dA, dbias = Factors(B, A, None).gradients(x, g, (*needs[:3], needs_bias))
    if dx is not None:
        dx = dx + _transposed(g, R, scale, form, group_size, K)
    dR = dscale = None
    if needs_R:  # block-diagonal: codes are not differentiable
        columns = x.reshape(-1, len(R), group_size)
        dR = torch.einsum("mbn,mbk->bnk", g.reshape(-1, *R.shape[:2]), columns)
    if needs_scale:
        dense = g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, K)  # the gradient of a dense R, [N, K]
        dscale = _group_sums(dense * decode(R, form, K, dense.dtype), group_size)
    return dx, dB, dA, dR, dscale, dbias


def _transposed(g: Tensor, R: Tensor, scale: Tensor | None, form: str, group_size: int, K: int) -> Tensor:
    """`g R` [..., K] for g [..., N]."""
    if form == "blockdiag":
        return torch.einsum("...bn,bnk->...bk", g.unflatten(-1, R.shape[:2]), R).flatten(-2)
    return g @ dequantise(R, scale, form, group_size, K)


def _group_sums(values: Tensor, group_size: int) -> Tensor:
    """Sums over every group of columns, [N, K] -> [N, groups]."""
    K = values.shape[1]
    return F.pad(values, (0, -K % group_size)).unflatten(1, (-1, group_size)).sum(-1)


register_layer_op(
    "lowrank_residual_linear(Tensor x, Tensor B, Tensor A, Tensor R, Tensor? scale, Tensor? bias, str form, "
    "int group_size) -> Tensor",
    reference,
    key=Key,
    describe=_describe,
    roofline=roofline,
    saved=_saved,
    backward=_backward,
    floor=separate_floor,
)
