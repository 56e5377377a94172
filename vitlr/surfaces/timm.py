"""What is particular to timm: attention that bypasses its own `qkv`, classifiers it names, constant queries.

Nothing here imports timm: the modules are known by what they hold, so that a copy or a subclass is served as well.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

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
