"""`y = softmax(q kᵀ / √d) v`, head by head, laid out as the linear after it reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.registration import register_layer_op

OP = "attention"


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The specification, in plain torch."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q kᵀ / √d) v`: q [B, H, L, d], k and v [B, H, S, d] -> y [B, L, H d], contiguous.

    Any strides; differentiable; no mask, no dropout. Raises InputError for shapes, dtypes or devices that do not fit.
    """
    return torch.ops.vitlr.attention.default(q, k, v)


class Key(NamedTuple):
    """What dispatch knows of a call: M queries of all images and heads, S keys of each, both None while unknown."""

    M: int | None
    S: int | None
    d: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def roofline(key: Key, ceilings: registry.Ceilings | None = None) -> registry.Roofline:
    """`4 M S d` FLOPs over the bytes of q and y alone: how often k and v are shared, M does not tell."""
    M = key.M or 0
    return registry.Roofline.of(4 * M * (key.S or 0) * key.d, key.dtype.itemsize * 2 * M * key.d, key.dtype, ceilings)


def _describe(M: int | None, q: Tensor, k: Tensor, v: Tensor) -> Key:
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise _unfit(q, k, v, ", expected")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise _unfit(q, k, v, " do not fit, expected")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise InputError(f"{OP}: {name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}")
    return Key(M, k.shape[2], q.shape[3], q.dtype, q.device)


def _unfit(q: Tensor, k: Tensor, v: Tensor, expected: str) -> InputError:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    return InputError(f"{OP}: {shapes}{expected} [B, H, L, d], [B, H, S, d] and [B, H, S, d]")


def _out(key: Key, q: Tensor, *_: Tensor) -> tuple[int, ...]:
    B, H, L, d = q.shape
    return B, L, H * d


def _backward(g: Tensor, needs: tuple[bool, ...], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    B, H, L, d = q.shape
    g = g.view(B, L, H, d).transpose(1, 2)
    # The shares [B, H, L, S] are computed again: not keeping them is what the fused forward is for.
    P = (q @ k.mT * d**-0.5).softmax(-1)
    dv = P.mT @ g
    dP = g @ v.mT
    dS = P * (dP - (dP * P).sum(-1, keepdim=True)) * d**-0.5
    return dS @ k, dS.mT @ q, dv


register_layer_op(
    "attention(Tensor q, Tensor k, Tensor v) -> Tensor",
    reference,
    key=Key,
    describe=_describe,
    out=_out,
    roofline=roofline,
    saved=lambda needs, *given: given,
    backward=_backward,
)
