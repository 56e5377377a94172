"""Linears that multiply bytes: integers, by what calibration saw of their inputs, or floats, by nothing."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from vitlr.anatomy import linears, visibility
from vitlr.calibration.options import RANGES
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.byte_steps import byte_inputs
from vitlr.errors import InputError
from vitlr.nn import Fp8Linear, QuantizedLinear, TokenInt8Linear
from vitlr.runtime.modules import swap
from vitlr.runtime.progress import Progress

_SHARE = 1 / 3  # of what all layers cost together that one may


@torch.no_grad()
def multiply_bytes(
    model: nn.Module, stats: Statistics, progress: Progress | None = None, by_token: bool = False
) -> list[str]:
    """Put an `Int8Linear` in place of the linears that `stats` measured, in place; their names.

    Channels whose range is too wide get further columns, where what that takes off the loss of all layers is worth it.
    A layer that would still cost more than a third of what all of them cost stays as it is. `by_token`: the columns'
    steps are chosen so too, but every token has its own range, which needs no further columns and cuts nothing off, so
    none stays (`TokenInt8Linear`). `stats` must be of the weights that the model has now, codes multiplied out, with
    the extra "ranges". Raises `InputError` otherwise.
    """
    if RANGES not in stats.extras:
        raise InputError('these statistics hold no ranges of inputs: calibrate(..., extras=("ranges",))')
    decode(model, stats.layers)
    visibility.make_visible(model)
    found = dict(model.named_modules())
    stats.check_fits({name: layer.weight for name in stats.layers if isinstance(layer := found.get(name), nn.Linear)})
    layers = byte_inputs(found, stats.layers, progress, spreading=not by_token)
    if by_token:
        for name, inputs in layers.items():
            swap(model, name, inputs.layer(TokenInt8Linear).train(found[name].training))
        return list(layers)
    limit = _SHARE * sum(layer.cost for layer in layers.values())
    names = [name for name, layer in layers.items() if layer.cost <= limit]
    for name in names:
        swap(model, name, layers[name].layer().train(found[name].training))
    return names


@torch.no_grad()
def decode(model: nn.Module, names: Container[str] | None = None) -> None:
    """Put linears in place of codes of rounded weights, of those names or of all, so that ranges can be measured."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear) and (names is None or name in names):
            swap(model, name, module.to_linear())


@torch.no_grad()
def multiply_tokens(model: nn.Module) -> list[str]:
    """Put a `TokenInt8Linear` in place of all linears that can be compressed, of factors and of codes; their names."""
    visibility.make_visible(model)
    found: dict[str, nn.Linear | QuantizedLinear] = dict(linears.survey(model, factors=True).targets)
    found |= {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, linear in (found or linears.targets(model, factors=True)).items():
        swap(model, name, TokenInt8Linear.from_linear(linear))
    return list(found)


@torch.no_grad()
def multiply_fp8(model: nn.Module) -> list[str]:
    """Put an `Fp8Linear` in place of all linears that can be compressed and of factors, in place; their names."""
    visibility.make_visible(model)
    found = linears.targets(model, factors=True)
    for name, linear in found.items():
        swap(model, name, Fp8Linear.from_linear(linear))
    return list(found)
