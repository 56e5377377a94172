"""What a model costs: logical parameters, multiply-accumulates of one image, stored bytes."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitlr.anatomy.visibility import visible
from vitlr.data.batches import call
from vitlr.nn import Fp8Linear, Int8Linear, QuantizedLinear, ResidualLowRankLinear
from vitlr.runtime import compact
from vitlr.runtime.contexts import evaluation_mode, frozen_parameters
from vitlr.runtime.modules import like

_WEIGHTS = ("weight", "codes", "row_exponent", "column_exponent", "fine", "twice")


@dataclass(frozen=True)
class Cost:
    """Parameters (tied ones once), MACs of one image, bytes of the state that a checkpoint stores."""

    params: int
    macs: int
    bytes: int


def count_params(model: nn.Module) -> int:
    """Number of parameters, tied ones once; quantised weights count, however they are stored."""
    total = sum(p.numel() for p in model.parameters())
    for m in model.modules():
        if isinstance(m, (Int8Linear, Fp8Linear)):
            total += m.in_features * m.out_features + m.out_features * (m.bias is not None)
        if isinstance(m, QuantizedLinear) or (isinstance(m, ResidualLowRankLinear) and m.scale is not None):
            total += m.in_features * m.out_features
    return total


def count_bytes(model: nn.Module) -> int:
    """Bytes of parameters and persistent buffers, tied ones once; of a rounded model what its file stores of them."""
    unique = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    if is_rounded(model):
        return sum(part.nbytes for t in unique.values() for part in compact.stored(t).values())
    return sum(t.numel() * t.element_size() for t in unique.values())


def is_rounded(model: nn.Module) -> bool:
    """Whether the model holds rounded weights, so that its file stores every tensor by what it was rounded to."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def rest(model: nn.Module, names: Container[str]) -> Iterator[Tensor]:
    """All parameters and persistent buffers, tied ones once, but the weights of the linears (or codes) named."""
    own = {f"{name}.{part}" for name, _ in model.named_modules() if name in names for part in _WEIGHTS}
    state = {key: t for key, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    weights = {id(t) for key, t in state.items() if key in own}
    yield from {id(t): t for t in state.values() if id(t) not in weights}.values()


def count_rest(model: nn.Module, names: Container[str]) -> int:
    """Bytes of all that once it is rounded."""
    return sum(part.nbytes for t in rest(model, names) for part in compact.stored(compact.rounded(t.detach())).values())


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
    with visible(model), evaluation_mode(model), frozen_parameters(model), torch.no_grad(), counter:
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
