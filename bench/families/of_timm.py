"""Families of timm: (name, arguments, pixels)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from bench.families.family import Family

VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
P16, P14 = {**VIT, "img_size": 32}, {**VIT, "img_size": 28}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "img_size": 32, "window_size": 4, "num_classes": 5}
FIVE = {"num_classes": 5}
STAGES = {**FIVE, "depths": (1, 1, 1, 1)}
WIDE = {**STAGES, "embed_dims": (16, 32, 48, 64)}

MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT": ("vit_tiny_patch16_224", P16, 32),
    "ViT, features": ("vit_tiny_patch16_224", {**P16, "num_classes": 0}, 32),
    "ViT, norms of q and k": ("vit_tiny_patch16_224", {**P16, "qk_norm": True}, 32),
    "DeiT": ("deit_tiny_patch16_224", P16, 32),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", P16, 32),
    "DeiT III": ("deit3_small_patch16_224", P16, 32),
    "DINOv2": ("vit_small_patch14_dinov2", P14, 28),
    "DINOv2, registers": ("vit_small_patch14_reg4_dinov2", P14, 28),
    "DINOv3": ("vit_small_patch16_dinov3_qkvb", P16, 32),
    "CLIP": ("vit_base_patch16_clip_224", P16, 32),
    "SigLIP": ("vit_base_patch16_siglip_224", P16, 32),
    "FlexiViT": ("flexivit_small", P16, 32),
    "NaFlexViT": ("naflexvit_base_patch16_gap", VIT, 32),
    "AIMv2": ("aimv2_large_patch14_224", P14, 28),
    "BEiT": ("beit_base_patch16_224", P16, 32),
    "BEiTv2": ("beitv2_base_patch16_224", P16, 32),
    "EVA02, tiny": ("eva02_tiny_patch14_224", P14, 28),
    "EVA02, base": ("eva02_base_patch14_224", P14, 28),
    "EVA": ("eva_giant_patch14_224", P14, 28),
    "ViT, rotary": ("vit_base_patch16_rope_reg1_gap_256", P16, 32),
    "SAM": ("samvit_base_patch16_224", {**P16, "global_attn_indexes": (0, 1)}, 32),
    "ViT, parallel": ("vit_small_patch16_18x2_224", P16, 32),
    "SO150M": ("vit_so150m_patch16_reg4_gap_256", P16, 32),
    "CaiT": ("cait_xxs24_224", {**FIVE, "depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}, 32),
    "XCiT": ("xcit_nano_12_p16_224", {**FIVE, "depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}, 32),
    "CrossViT": ("crossvit_tiny_240", FIVE, 240),
    "CoaT": ("coat_lite_tiny", {**FIVE, "img_size": 64}, 64),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, 32),
    "SwinV2": ("swinv2_tiny_window8_256", SWIN, 32),
    "SwinV2, CR": ("swinv2_cr_tiny_ns_224", SWIN, 32),
    "Hiera": ("hiera_tiny_224", {**FIVE, "embed_dim": 16, "stages": (1, 1, 1, 1)}, 224),
    "MViTv2": ("mvitv2_tiny", {**FIVE, "img_size": 64}, 64),
    "PVTv2": ("pvt_v2_b0", STAGES, 64),
    "Twins": ("twins_svt_small", WIDE, 224),
    "DaViT": ("davit_tiny", {**WIDE, "num_heads": (1, 2, 3, 4)}, 64),
    "MaxViT": ("maxvit_rmlp_pico_rw_256", FIVE, 256),
    "CoAtNet": ("coatnet_nano_rw_224", FIVE, 224),
    "LeViT": ("levit_128s", FIVE, 224),
    "TinyViT": ("tiny_vit_5m_224", STAGES, 224),
    "MobileViT": ("mobilevit_xxs", FIVE, 64),
    "MobileViTv2": ("mobilevitv2_050", FIVE, 64),
    "EdgeNeXt": ("edgenext_xx_small", FIVE, 64),
    "EfficientViT, MIT": ("efficientvit_b0", FIVE, 64),
    "EfficientViT, MSRA": ("efficientvit_m0", FIVE, 224),
    "FastViT": ("fastvit_t8", FIVE, 64),
    "RepViT": ("repvit_m0_9", FIVE, 64),
    "ConvNeXt": ("convnext_atto", FIVE, 64),
    "ConvNeXt, linears": ("convnext_tiny", {**STAGES, "dims": (8, 16, 24, 32)}, 32),
    "ConvNeXtV2": ("convnextv2_atto", FIVE, 64),
}


def families() -> Iterator[tuple[str, Family]]:
    for family, (name, arguments, pixels) in MODELS.items():
        yield family, Family(partial(_build, name, arguments), (3, pixels, pixels), arguments)


def _build(name: str, arguments: dict[str, Any]) -> Any:
    from vitlr.checkpoint.creation import create_model

    return create_model(name, **arguments)
