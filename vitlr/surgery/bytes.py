"""Linears that multiply bytes: an `Int8Linear` where a plain linear was, by what calibration saw of its inputs."""

from __future__ import annotations

import torch
from torch import nn

from vitlr.anatomy import visibility
from vitlr.calibration.options import RANGES
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.byte_steps import int8_linear
from vitlr.errors import InputError
from vitlr.nn import Int8Linear
from vitlr.runtime.modules import swap

_SHARE = 1 / 3  # of what all layers cost together that one may


@torch.no_grad()
def multiply_bytes(model: nn.Module, stats: Statistics) -> list[str]:
    """Put an `Int8Linear` in place of the linears that `stats` measured, in place; their names.

    One that would cost more than a third of what all of them cost stays as it is: ViTs have single neurons of a size
    that no step suits. `stats` must be of the weights that the model has now, with the extra "ranges". Raises
    `InputError` otherwise.
    """
    if RANGES not in stats.extras:
        raise InputError('these statistics hold no ranges of inputs: calibrate(..., extras=("ranges",))')
    visibility.make_visible(model)
    found = dict(model.named_modules())
    stats.check_fits({name: layer.weight for name in stats.layers if isinstance(layer := found.get(name), nn.Linear)})
    made: dict[str, tuple[Int8Linear, float]] = {}
    for name, layer in stats.layers.items():
        linear = found[name]
        assert isinstance(linear, nn.Linear)
        made[name] = int8_linear(linear, layer)
    limit = _SHARE * sum(cost for _, cost in made.values())
    names = [name for name, (_, cost) in made.items() if cost <= limit]
    for name in names:
        swap(model, name, made[name][0].train(found[name].training))
    return names
