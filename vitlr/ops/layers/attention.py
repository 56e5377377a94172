"""`y = softmax(q kᵀ / √d) v`, head by head, laid out as the linear after it reads it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.autocast import compute_dtype, register_autocast

OP = "attention"


class Key(NamedTuple):
    """What dispatch knows of a call: M queries of all images and heads, S keys of each, both None while unknown."""

    M: int | None
    S: int | None
    d: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q kᵀ / √d) v`: q [B, H, L, d], k and v [B, H, S, d] -> y [B, L, H d], contiguous.

    Any strides; differentiable; no mask, no dropout. Raises InputError for shapes, dtypes or devices that do not fit.
    """
    return torch.ops.vitlr.attention.default(q, k, v)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The specification, in plain torch."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def roofline(
    M: int, S: int, d: int, dtype: torch.dtype, ceilings: registry.Ceilings | None = None
) -> registry.Roofline:
    """`4 M S d` FLOPs over the bytes of q and y alone: how often k and v are shared, M does not tell."""
    flops, size = 4 * M * S * d, dtype.itemsize * 2 * M * d
    return registry.Roofline(flops, size, None if ceilings is None else ceilings.microseconds(flops, size, dtype))


def has_kernels() -> bool:
    """Whether there is anything to choose from but plain torch."""
    return registry.has_kernels(OP)


def kernel_chosen(q: Tensor, k: Tensor) -> bool:
    """Whether dispatch takes a kernel rather than plain torch for q and k; a constant where a graph is traced."""
    known = not torch.compiler.is_compiling()
    M, S = (q.shape[:-1].numel(), k.shape[2]) if known else (None, None)
    return registry.kernel_chosen(OP, M, S, q.shape[3], compute_dtype(q), q.device)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise InputError(f"{OP}: {shapes}, expected [B, H, L, d], [B, H, S, d] and [B, H, S, d]")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise InputError(f"{OP}: {shapes} do not fit, expected [B, H, L, d], [B, H, S, d] and [B, H, S, d]")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise InputError(f"{OP}: {name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}")


_lib = torch.library.Library("vitlr", "FRAGMENT")
_lib.define("attention(Tensor q, Tensor k, Tensor v) -> Tensor")


@torch.library.register_fake("vitlr::attention", lib=_lib)
def _fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _check(q, k, v)
    B, H, L, d = q.shape
    return q.new_empty((B, L, H * d))


def _run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _check(q, k, v)
    B, H, L, d = q.shape
    key = Key(B * H * L, k.shape[2], d, q.dtype, q.device)
    return registry.select(OP, key).run(q, k, v).contiguous()


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v = ctx.saved_tensors
    B, H, L, d = q.shape
    g = g.view(B, L, H, d).transpose(1, 2)
    # The shares [B, H, L, S] are computed again: not keeping them is what the fused forward is for.
    P = (q @ k.mT * d**-0.5).softmax(-1)
    dv = P.mT @ g
    dP = g @ v.mT
    dS = P * (dP - (dP * P).sum(-1, keepdim=True)) * d**-0.5
    return dS @ k, dS.mT @ q, dv


_lib.impl("attention", _run, "CompositeExplicitAutograd")
torch.library.register_autograd("vitlr::attention", _backward, setup_context=_setup, lib=_lib)
register_autocast(_lib, torch.ops.vitlr.attention.default)


@register_flop_formula(torch.ops.vitlr.attention)
def _flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return roofline(math.prod(q[:3]), k[2], q[3], torch.float32).flops


registry.register_op(
    OP,
    Key,
    lambda key, limits: roofline(key.M or 0, key.S or 0, key.d, key.dtype, limits),
    registry.Candidate("torch", lambda key: None, reference, ran_on=("CPU",)),
)
