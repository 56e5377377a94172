"""`y = softmax(q kᵀ / √d + bias) v`, head by head, laid out as the linear after it reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.registration import register_layer_op

OP = "attention"


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The specification, in plain torch."""
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """`softmax(q kᵀ / √d + bias) v`: q [B, H, L, d], k and v [B, H, S, d] -> y [B, L, H d], contiguous.

    bias [B, H, L, S], each but S may be 1: what positions add to scores, -inf where a query does not see a key; one
    that sees none gets zeros. Any strides; differentiable; no dropout. Raises InputError for shapes, dtypes or devices
    that do not fit.
    """
    return torch.ops.vitlr.attention.default(q, k, v, bias)


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


def _describe(M: int | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Key:
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise _unfit(q, k, v, ", expected")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise _unfit(q, k, v, " do not fit, expected")
    for name, tensor in (("k", k), ("v", v), ("bias", bias)):
        if tensor is not None and (tensor.dtype != q.dtype or tensor.device != q.device):
            raise InputError(f"{OP}: {name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}")
    sizes = (*q.shape[:3], k.shape[2])
    if bias is not None and (
        bias.dim() != 4 or any(bias.shape[i] not in (sizes[i], 1 if i < 3 else None) for i in range(4))
    ):
        raise InputError(f"{OP}: bias {list(bias.shape)} does not fit, expected {list(sizes)}, or 1 before the last")
    return Key(M, k.shape[2], q.shape[3], q.dtype, q.device)


def _unfit(q: Tensor, k: Tensor, v: Tensor, expected: str) -> InputError:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    return InputError(f"{OP}: {shapes}{expected} [B, H, L, d], [B, H, S, d] and [B, H, S, d]")


def _out(key: Key, q: Tensor, *_: Tensor | None) -> tuple[int, ...]:
    B, H, L, d = q.shape
    return B, L, H * d


def _backward(
    g: Tensor, needs: tuple[bool, ...], q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    B, H, L, d = q.shape
    g = g.view(B, L, H, d).transpose(1, 2)
    # The shares [B, H, L, S] are computed again: not keeping them is what the fused forward is for.
    scores = q @ k.mT * d**-0.5
    P = (scores if bias is None else scores + bias).softmax(-1)
    P = P if bias is None else P.masked_fill((bias == -torch.inf).all(-1, keepdim=True), 0)  # of who sees no key
    dv = P.mT @ g
    dP = g @ v.mT
    dS = P * (dP - (dP * P).sum(-1, keepdim=True))
    dbias = dS.sum_to_size(bias.shape) if bias is not None and needs[3] else None
    return dS @ k * d**-0.5, dS.mT @ q * d**-0.5, dv, dbias


register_layer_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias) -> Tensor",
    reference,
    key=Key,
    describe=_describe,
    out=_out,
    roofline=roofline,
    saved=lambda needs, *given: given,
    backward=_backward,
)
