"""Where the dense and the compressed network can be compared on the way: blocks, and the low-rank layers in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.errors import NumericalError
from vitlr.nn import LowRankLinear

_INDEX = re.compile(r"(.*_)?\d+")  # "3", "encoder_layer_3"; not "fc1"


def lowrank_layers(model: nn.Module) -> list[str]:
    """Names of the low-rank layers in the order in which the model lists them."""
    return [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]


def free_layers(model: nn.Module) -> list[str]:
    """The low-rank layers of which no parameter is frozen."""
    layers = lowrank_layers(model)
    return [name for name in layers if all(p.requires_grad for p in model.get_submodule(name).parameters())]


def comparable(layers: Sequence[str], model: nn.Module, reference: nn.Module, *, inputs: bool = False) -> list[str]:
    """Those whose outputs (and `inputs`) the dense network has in the same shape: not so beside removed channels."""
    dense = dict(reference.named_modules())
    keys = ("out_features", "in_features") if inputs else ("out_features",)
    shapes = {name: [getattr(model.get_submodule(name), key) for key in keys] for name in layers}
    return [name for name, own in shapes.items() if [getattr(dense.get(name), key, None) for key in keys] == own]


def free_norms(model: nn.Module, reference: nn.Module) -> list[str]:
    """The LayerNorms over the last dimension with scale and shift, neither frozen, that the dense network has too."""
    dense = dict(reference.named_modules())

    def free(name: str, module: nn.Module) -> bool:
        own = [p for p in module.parameters() if p.requires_grad]
        plain = isinstance(module, nn.LayerNorm) and "2d" not in type(module).__name__
        return plain and len(own) == 2 and getattr(dense.get(name), "normalized_shape", None) == module.normalized_shape

    return [name for name, module in model.named_modules() if free(name, module)]


def block_of(layer: str) -> str:
    """The repeated block around a layer: `blocks.3.mlp.fc1` is in `blocks.3`; a layer in none stands for itself.

    A numbered part counts if at least two parts follow, so that `encoder_layer_3.mlp.0` is in `encoder_layer_3`.
    """
    parts = layer.split(".")
    for end in range(len(parts) - 2, 0, -1):
        if _INDEX.fullmatch(parts[end - 1]):
            return ".".join(parts[:end])
    return layer


def by_block(layers: Sequence[str]) -> dict[str, list[str]]:
    """These layers of every block, in order."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(block_of(layer), []).append(layer)
    return found


def tensor_of(output: Any) -> Tensor:
    """A block's hidden states: the output, or the first of several."""
    return output if isinstance(output, Tensor) else tensor_of(output[0])


def finite(layer: str, *tensors: Tensor) -> None:
    """`NumericalError` that names the layer where what was measured at it holds NaN or Inf."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise NumericalError(f"{layer}: its inputs or outputs hold NaN or Inf; check the images and both models")


@contextmanager
def watched(model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(name, input, output)` whenever one of the named modules has run."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, args, output: see(name, args[0], tensor_of(output))

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Enough(Exception):
    """Raised in a hook to leave a forward pass of which the rest is not needed."""


def run_until(model: nn.Module, inputs: Tensor, last: str) -> None:
    """Run the model up to and including the module `last`."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Enough

    handle = model.get_submodule(last).register_forward_hook(stop)
    try:
        model(inputs)
    except _Enough:
        pass
    finally:
        handle.remove()
