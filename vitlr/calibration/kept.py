"""Activations that wait for their gradients, made again where autograd keeps what they were made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def kept(t: Tensor) -> Callable[[], Tensor]:
    """What gives t's values, up to rounding, until the backward pass has gone through what made it.

    A tensor held beside the graph takes memory until then; GELU and LayerNorm hold their own inputs there anyway, and
    making their outputs again takes a hundredth of a pass.
    """
    seen, node = t.detach(), t.grad_fn
    make = _MADE.get(type(node).__name__)
    if make is None or _intercepted():
        return lambda: seen
    dtype = t.dtype
    return lambda: make(node).detach().to(dtype)


def _normalised(node: Any) -> Tensor:
    x = (node._saved_input - node._saved_result1) * node._saved_result2  # mean, and one over the deviation
    weight, bias = node._saved_weight, node._saved_bias
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


_MADE: dict[str, Callable[[Any], Tensor]] = {  # by the node of the graph, which holds what it saved
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
    "NativeLayerNormBackward0": _normalised,
}


def _intercepted() -> bool:
    """Whether what autograd saves is packed by someone: activation checkpointing lets it be read only once."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None
