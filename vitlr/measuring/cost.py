"""What a model costs: logical parameters, multiply-accumulates of one image, stored bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitlr.data.batches import call
from vitlr.nn import ResidualLowRankLinear
from vitlr.runtime.contexts import evaluation_mode, frozen_parameters
from vitlr.runtime.modules import like


@dataclass(frozen=True)
class Cost:
    """Parameters (tied ones once), MACs of one image, bytes of the state that a checkpoint stores."""

    params: int
    macs: int
    bytes: int


def count_params(model: nn.Module) -> int:
    """Number of parameters, tied ones once; the weights of a quantised residual count, however they are stored."""
    quantised = [m for m in model.modules() if isinstance(m, ResidualLowRankLinear) and m.scale is not None]
    return sum(p.numel() for p in model.parameters()) + sum(m.in_features * m.out_features for m in quantised)


def count_bytes(model: nn.Module) -> int:
    """Bytes of parameters and persistent buffers, tied ones once."""
    unique = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in unique.values())


def count_macs(model: nn.Module, inputs: Any) -> int:
    """Multiply-accumulates of the matrix products and convolutions of one forward pass (half of torch's FLOPs)."""
    return _counted(model, inputs).get_total_flops() // 2


def count_macs_of(model: nn.Module, inputs: Any, names: Iterable[str]) -> dict[str, int]:
    """The same for the modules called `names`, each with all that it holds."""
    flops = _counted(model, inputs).get_flop_counts()
    return {name: sum(flops.get(f"{type(model).__name__}.{name}", {}).values()) // 2 for name in names}


def _counted(model: nn.Module, inputs: Any) -> FlopCounterMode:
    counter = FlopCounterMode(display=False)
    # Frozen as well: the counter asks views of parameters for a gradient function, which no_grad keeps from them.
    with evaluation_mode(model), frozen_parameters(model), torch.no_grad(), counter:
        call(model, inputs)
    return counter


def example_input(model: nn.Module, input_shape: Any) -> Any:
    """One image of zeros in the model's dtype and device; `input_shape` as `Statistics` keeps it."""
    p = like(model)
    if isinstance(input_shape, dict):
        return {key: torch.zeros(1, *shape, dtype=p.dtype, device=p.device) for key, shape in input_shape.items()}
    return torch.zeros(1, *input_shape, dtype=p.dtype, device=p.device)


def measure(model: nn.Module, input_shape: Any) -> Cost:
    """The cost of a model on one image of shape `input_shape` (without the batch dimension)."""
    return Cost(count_params(model), count_macs(model, example_input(model, input_shape)), count_bytes(model))
