"""MLPs with a depthwise convolution over tokens between their linears: it, too, treats every hidden neuron alone."""

from __future__ import annotations

from torch import nn

from vitlr.runtime.modules import class_of

# Classes whose forward is known, `fc2(act(conv(fc1(x))))` with x as a map of tokens in between: fc1, conv, fc2.
_KNOWN = {
    "timm.models.pvt_v2.MlpWithDepthwiseConv": ("fc1", "dwconv", "fc2"),
    "transformers.models.pvt_v2.modeling_pvt_v2.PvtV2ConvFeedForwardNetwork": ("dense1", "dwconv.dwconv", "dense2"),
    "transformers.models.segformer.modeling_segformer.SegformerMixFFN": ("dense1", "dwconv.dwconv", "dense2"),
    "transformers.models.segformer.modeling_segformer.SegformerMixMLP": ("fc1", "dwconv.dwconv", "fc2"),
}


def parts(module: nn.Module) -> tuple[str, str, str] | None:
    """The names of first linear, convolution and second linear; None of any other module."""
    names = _KNOWN.get(class_of(module))
    conv = None if names is None else module.get_submodule(names[1])
    if type(conv) is not nn.Conv2d or {conv.in_channels, conv.out_channels} != {conv.groups}:
        return None
    return names


def others(module: nn.Module) -> dict[str, nn.Module]:
    """What stands between the linears of such a module besides the convolution, by name."""
    names = _KNOWN[class_of(module)]
    own = {name.split(".")[0] for name in names}
    return {name: child for name, child in module.named_children() if name not in own}
