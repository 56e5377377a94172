"""`W C Wᵀ`: a batch of symmetric congruences, as every decomposition begins with one (`Lᵀ M L`, `R C Rᵀ`).

The result is symmetric, so a kernel that forms one triangle saves half of the second product.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.registration import define
from vitlr.ops.linalg.gram import exact_products

OP = "weighted_gram_chain"
DTYPES = (torch.float32, torch.float64)


class Key(NamedTuple):
    """What dispatch knows of a call."""

    b: int
    m: int
    k: int
    dtype: torch.dtype = torch.float64
    device: torch.device = torch.device("cpu")


def weighted_gram_chain(W: Tensor, C: Tensor) -> Tensor:
    """`W C Wᵀ` for a batch: W [b, m, k], C [b, k, k] symmetric -> [b, m, m], exactly symmetric, contiguous.

    fp32 (IEEE, whatever TF32 setting is on) or fp64, any strides: for `Lᵀ G L` pass `L.mT`. Not differentiable.
    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    return torch.ops.vitlr.weighted_gram_chain.default(W.detach(), C.detach())


def reference(W: Tensor, C: Tensor) -> Tensor:
    """The specification, in plain torch."""
    with exact_products(W.device) if W.dtype == torch.float32 else nullcontext():
        Y = W @ C @ W.mT
    return Y.triu_().add_(Y.triu(1).mT)


def roofline(key: Key, ceilings: registry.Ceilings | None = None) -> registry.Roofline:
    """`2 b m k²` FLOPs for `W C`, `b m (m + 1) k` for a triangle of the rest; W, C and the result pass once."""
    b, m, k = key.b, key.m, key.k
    size = key.dtype.itemsize * b * (m * k + k * k + m * m)
    return registry.Roofline.of(b * m * k * (2 * k + m + 1), size, key.dtype, ceilings)


def _check(W: Tensor, C: Tensor) -> None:
    if W.dim() != 3 or W.dtype not in DTYPES:
        raise InputError(f"{OP}: W is {list(W.shape)} {W.dtype}, expected [b, m, k] in fp32 or fp64")
    b, _, k = W.shape
    if C.shape != (b, k, k) or C.dtype != W.dtype:
        raise InputError(f"{OP}: C is {list(C.shape)} {C.dtype}, expected [{b}, {k}, {k}] {W.dtype}")
    if C.device != W.device:
        raise InputError(f"{OP}: C is on {C.device}, W on {W.device}")


def _fake(W: Tensor, C: Tensor) -> Tensor:
    _check(W, C)
    return W.new_empty(W.shape[0], W.shape[1], W.shape[1])


def _run(W: Tensor, C: Tensor) -> Tensor:
    _check(W, C)
    b, m, k = W.shape
    return registry.select(OP, Key(b, m, k, W.dtype, W.device)).run(W, C)


define(
    "weighted_gram_chain(Tensor W, Tensor C) -> Tensor",
    fake=_fake,
    run=_run,
    flops=lambda W, C: roofline(Key(*W.shape)).flops,
)
registry.register_op(OP, Key, roofline, registry.Candidate("torch", lambda key: None, reference, ran_on=("CPU",)))
