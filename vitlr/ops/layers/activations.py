"""The activations that ops know, by name, each with its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlr.errors import InputError

aten = torch.ops.aten

# name -> (act(p), gradient for p given the gradient g for act(p))
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "none": (lambda p: p, lambda g, p: g),
    "gelu": (F.gelu, lambda g, p: aten.gelu_backward(g, p)),
    "gelu_tanh": (
        lambda p: F.gelu(p, approximate="tanh"),
        lambda g, p: aten.gelu_backward(g, p, approximate="tanh"),
    ),
    "silu": (F.silu, lambda g, p: aten.silu_backward(g, p)),
    "sigmoid": (torch.sigmoid, lambda g, p: aten.sigmoid_backward(g, torch.sigmoid(p))),
    "relu": (F.relu, lambda g, p: aten.threshold_backward(g, p, 0)),
}


def check_activation(op: str, act: str) -> None:
    """Raises InputError for a name that is none of them."""
    if act not in ACTIVATIONS:
        raise InputError(f"{op}: unknown act {act!r}, expected one of {', '.join(ACTIVATIONS)}")
