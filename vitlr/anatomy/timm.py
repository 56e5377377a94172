"""What is particular to timm: attention that bypasses its own `qkv`, classifiers it names, constant queries, blocks.

Nothing here imports timm: the modules are known by what they hold, so that a copy or a subclass is served as well.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from vitlr.nn import FusedAttention, LowRankGLU, LowRankMLP
from vitlr.nn.fused_attention import CLASSES as _ATTENTION
from vitlr.runtime.modules import class_of

SWITCH = "qkv_bias_separate"
"""timm's attribute of BEiT, EVA and SwinV2 attention: True calls `qkv` and adds the bias after it."""


def switchable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the attention modules whose `qkv` runs only while the switch is on.

    `forward` reads `self.qkv.weight` into `F.linear` while the switch is off and there is a q/v bias to add,
    so hooks do not fire and a replacement of `qkv` is never called.
    Source: timm/models/{beit,eva,swin_transformer_v2}.py.
    """
    for name, module in model.named_modules():
        has_bias = getattr(module, "q_bias", None) is not None and isinstance(getattr(module, "qkv", None), nn.Module)
        if has_bias and isinstance(getattr(module, SWITCH, None), bool):
            yield name, module


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Return the classifier modules that `model` or any timm model inside it names by `get_classifier()`."""
    found: list[nn.Module] = []
    for module in model.modules():
        method = getattr(module, "get_classifier", None)
        if not callable(method):
            continue
        heads = method()
        found += [m for m in (heads if isinstance(heads, (tuple, list)) else (heads,)) if isinstance(m, nn.Module)]
    return found


def constant_queries(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the query projections of latent attention pooling (SigLIP): their input is a parameter, not an image."""
    for module in model.modules():
        latent, q = getattr(module, "latent", None), getattr(module, "q", None)
        if isinstance(latent, nn.Parameter) and isinstance(q, nn.Module):
            yield q


SCALES = ("timm.models.vision_transformer.LayerScale", "timm.layers.layer_scale.LayerScale")
_BLOCKS = ("timm.models.vision_transformer.Block",)


def half_blocks(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...], str, str]]:
    """Yield (norm, first linears, last linear, scale) by name, for both halves of every pre-norm block.

    `x + scale(half(norm(x)))` where the norm feeds nothing but the first linears (two in a gated MLP whose gate and
    value are not packed) and the scale gets what the last one returns. Only classes whose forward is known are taken,
    since this cannot be seen from what a module holds.
    Source: timm/models/vision_transformer.py, timm/layers/attention.py.
    """
    for name, block in model.named_modules():
        if class_of(block) not in _BLOCKS:
            continue
        prefix = f"{name}." if name else ""
        attention = block.get_submodule("attn")
        known = isinstance(attention, FusedAttention) or class_of(attention) in _ATTENTION
        if known and getattr(attention, "gate", None) is None:
            yield f"{prefix}norm1", (f"{prefix}attn.qkv",), f"{prefix}attn.proj", f"{prefix}ls1"
        mlp = block.get_submodule("mlp")
        if isinstance(mlp, (LowRankMLP, LowRankGLU)):
            first = ("fc1",) if "fc1" in mlp._modules else ("fc1_g", "fc1_x")
            yield (
                f"{prefix}norm2",
                tuple(f"{prefix}mlp.{linear}" for linear in first),
                f"{prefix}mlp.fc2",
                f"{prefix}ls2",
            )
