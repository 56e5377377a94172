"""Families of open_clip: the towers of a CLIP of its own, or on a ViT of timm's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from bench.families.family import Family

SMALL = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"vocab_size": 64, "width": 32, "heads": 2, "layers": 1, "context_length": 8}
TIMM = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"}

MODELS: dict[str, dict[str, Any]] = {
    "CLIP, images": SMALL,
    "CLIP, images, pooled by attention": {**SMALL, "attentional_pool": True, "attn_pooler_queries": 4},
    "CLIP, images, of timm's": TIMM,
}


def families() -> Iterator[tuple[str, Family]]:
    for family, vision in MODELS.items():
        yield family, Family(partial(_visual, vision), (3, vision["image_size"], vision["image_size"]))
    yield "CLIP, both towers", Family(partial(clip, SMALL), (3, 32, 32))


def _visual(vision: dict[str, Any]) -> Any:
    return clip(vision).visual


def clip(vision: dict[str, Any]) -> Any:
    """A CLIP whose answer to images alone is what it makes of them, and None for texts."""
    import open_clip

    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT)
