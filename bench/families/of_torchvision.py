"""Families of torchvision: (class, arguments, pixels)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from bench.families.family import Family

VIT = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 32,
    "mlp_dim": 64,
    "num_classes": 5,
}
SWIN = {
    "patch_size": [4, 4],
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": [4, 4],
    "num_classes": 5,
}
MAXVIT = {
    "input_size": (64, 64),
    "stem_channels": 16,
    "partition_size": 2,
    "block_channels": [16, 32],
    "block_layers": [1, 1],
    "head_dim": 8,
    "stochastic_depth_prob": 0.0,
    "num_classes": 5,
}

MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT": ("VisionTransformer", VIT, 32),
    "Swin": ("SwinTransformer", SWIN, 32),
    "SwinV2": ("SwinTransformer", SWIN, 32),
    "MaxViT": ("MaxVit", MAXVIT, 64),
}


def families() -> Iterator[tuple[str, Family]]:
    for family, (name, arguments, pixels) in MODELS.items():
        yield family, Family(partial(_build, family, name, arguments), (3, pixels, pixels))


def _build(family: str, name: str, arguments: dict[str, Any]) -> Any:
    import torchvision.models
    from torchvision.models import swin_transformer

    more: dict[str, Any] = {}
    if family == "SwinV2":
        more = {"block": swin_transformer.SwinTransformerBlockV2, "downsample_layer": swin_transformer.PatchMergingV2}
    return getattr(torchvision.models, name)(**arguments, **more)
