"""Layers that hold weights for every channel alone, and modules that are one linear with such a layer behind it."""

from __future__ import annotations

from torch import nn

from vitlr.nn import (
    Fp8Linear,
    Int8Linear,
    LowRankLinear,
    PointwiseConv,
    QuantizedLinear,
    ResidualLowRankLinear,
    SelectedLinear,
)
from vitlr.runtime.modules import class_of, join

LINEARS = (nn.Linear, LowRankLinear, ResidualLowRankLinear, SelectedLinear, QuantizedLinear, Int8Linear, Fp8Linear)

# Classes whose forward is known: the linear, then a norm by batch over what it returns, its last dimension as channels.
_NORMED = {
    "timm.models.levit.LinearNorm": ("linear", "bn"),
    "transformers.models.levit.modeling_levit.MLPLayerWithBN": ("linear", "batch_norm"),
}
_NORMED_CONVS = {"timm.models.levit.ConvNorm": ("linear", "bn")}  # the same of a convolution


def is_channelwise(module: nn.Module) -> bool:
    """Whether a module of maps [images, channels, ...] makes each channel of that one alone, with its own weights."""
    if type(module) is nn.Conv2d:
        return {module.in_channels, module.out_channels} == {module.groups}
    return type(module) is nn.BatchNorm2d


def linear_in(module: nn.Module) -> tuple[str, tuple[str, ...]] | None:
    """Where a module has the linear that it is, and the layers behind that one, channel by channel; None of others.

    ("", ()) of a linear itself.
    """
    if isinstance(module, LINEARS):
        return "", ()
    if isinstance(module, PointwiseConv):
        return ("linear", ()) if isinstance(module.linear, LINEARS) else None
    if class_of(module) in _NORMED:
        linear, norm = _NORMED[class_of(module)]
        whole = isinstance(module.get_submodule(linear), LINEARS) and type(module.get_submodule(norm)) is nn.BatchNorm1d
        return (linear, (norm,)) if whole else None
    in_a_row = type(module).forward is nn.Sequential.forward
    names = tuple(module._modules) if in_a_row else _NORMED_CONVS.get(class_of(module), ())
    if not names or not isinstance(module._modules[names[0]], PointwiseConv):
        return None
    behind = [module.get_submodule(name) for name in names[1:]]
    return (join(names[0], "linear"), names[1:]) if all(map(is_channelwise, behind)) else None


def is_map(module: nn.Module) -> bool:
    """Whether a module that `linear_in` knows returns maps, whose channels are not the last dimension."""
    return any(isinstance(part, PointwiseConv) for part in module.modules())
