"""Linears that multiply bytes: integers, by what calibration saw of their inputs, or floats, with or without it."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from vitlr.anatomy import linears, visibility
from vitlr.calibration.options import RANGES, ROUNDING
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.byte_steps import byte_inputs
from vitlr.decomposition.fp8_rounding import rounded
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.options import Decomposition
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
def multiply_fp8(model: nn.Module, stats: Statistics | None = None, progress: Progress | None = None) -> list[str]:
    """Put an `Fp8Linear` in place of all linears that can be compressed and of factors, in place; their names.

    Weights are rounded to the nearest, and those that `stats` measured so that the loss of all layers moves least.
    `stats` must be of the weights that the model has now, with the extra "rounding". Raises `InputError` otherwise.
    """
    visibility.make_visible(model)
    found, objective = linears.targets(model, factors=True), None
    if stats is not None:
        if ROUNDING not in stats.extras:
            raise InputError('these statistics hold no sides to round by: calibrate(..., extras=("rounding",))')
        stats.check_fits({name: found[name].weight for name in stats.layers if name in found})
        objective = Objective.of(stats, Decomposition())
    for done, (name, linear) in enumerate(found.items(), 1):
        if stats is None or objective is None or name not in stats.layers:
            layer = Fp8Linear.from_linear(linear)
        else:
            layer = Fp8Linear(rounded(linear, stats.layers[name], objective)).train(linear.training)
        swap(model, name, layer)
        if progress is not None:
            progress(done, len(found))
    return list(found)
