"""The families that docs/models.md speaks of: each a function that makes a small one of random weights, and its images.

Small where the library lets its user say so, else its smallest; names are `library/family`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VIT = {"depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 10}
P16, P14 = {**VIT, "img_size": 64}, {**VIT, "img_size": 56}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "img_size": 32, "window_size": 4, "num_classes": 10}
HF = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "num_labels": 10}
MLP = {"intermediate_size": 128}
TINY = {"num_classes": 10}

# family: (name in timm, arguments, pixels)
TIMM: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", P16, 64),
    "vit, features": ("vit_tiny_patch16_224", {**P16, "num_classes": 0}, 64),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", P16, 64),
    "deit3": ("deit3_small_patch16_224", P16, 64),
    "dinov2, registers": ("vit_small_patch14_reg4_dinov2", P14, 56),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", P16, 64),
    "clip": ("vit_base_patch16_clip_224", P16, 64),
    "siglip": ("vit_base_patch16_siglip_224", P16, 64),
    "flexivit": ("flexivit_small", P16, 64),
    "naflexvit": ("naflexvit_base_patch16_gap", {**VIT, "img_size": None}, 64),
    "aimv2": ("aimv2_large_patch14_224", P14, 56),
    "beit": ("beit_base_patch16_224", P16, 64),
    "beitv2": ("beitv2_base_patch16_224", P16, 64),
    "eva02": ("eva02_tiny_patch14_224", P14, 56),
    "eva02, base": ("eva02_base_patch14_224", P14, 56),
    "eva": ("eva_giant_patch14_224", P14, 56),
    "rope vit": ("vit_base_patch16_rope_reg1_gap_256", P16, 64),
    "sam": ("samvit_base_patch16_224", {**P16, "global_attn_indexes": (0, 1)}, 64),
    "parallel vit": ("vit_small_patch16_18x2_224", P16, 64),
    "volo": ("volo_d1_224", TINY, 224),
    "cait": ("cait_xxs24_224", {**TINY, "depth": 2, "embed_dim": 64, "num_heads": 2}, 224),
    "xcit": ("xcit_nano_12_p16_224", {**TINY, "depth": 2}, 224),
    "crossvit": ("crossvit_tiny_240", TINY, 240),
    "coat": ("coat_lite_tiny", TINY, 224),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 32),
    "swinv2": ("swinv2_tiny_window8_256", SWIN, 32),
    "swinv2, cr": ("swinv2_cr_tiny_ns_224", SWIN, 32),
    "hiera": ("hiera_tiny_224", {**TINY, "embed_dim": 32, "stages": (1, 1, 1, 1)}, 224),
    "mvitv2": ("mvitv2_tiny", {**TINY, "depths": (1, 1, 1, 1), "embed_dims": 32}, 224),
    "pvt_v2": ("pvt_v2_b0", TINY, 224),
    "twins": ("twins_svt_small", {**TINY, "depths": (1, 1, 1, 1), "embed_dims": (32, 64, 128, 256)}, 224),
    "davit": ("davit_tiny", {**TINY, "depths": (1, 1, 1, 1), "embed_dims": (32, 64, 128, 256)}, 224),
    "gcvit": ("gcvit_xxtiny", {**TINY, "depths": (1, 1, 1, 1), "embed_dim": 32}, 224),
    "maxvit": ("maxvit_rmlp_pico_rw_256", TINY, 256),
    "coatnet": ("coatnet_nano_rw_224", TINY, 224),
    "levit": ("levit_128s", TINY, 224),
    "tiny_vit": ("tiny_vit_5m_224", TINY, 224),
    "mobilevit": ("mobilevit_xxs", TINY, 128),
    "mobilevitv2": ("mobilevitv2_050", TINY, 128),
    "edgenext": ("edgenext_xx_small", TINY, 128),
    "efficientvit, mit": ("efficientvit_b0", TINY, 128),
    "efficientvit, msra": ("efficientvit_m0", TINY, 224),
    "fastvit": ("fastvit_t8", TINY, 128),
    "repvit": ("repvit_m0_9", TINY, 128),
    "nextvit": ("nextvit_small", {**TINY, "depths": (1, 1, 1, 1)}, 128),
    "convnext": ("convnext_atto", TINY, 64),
    "convnext, tiny": ("convnext_tiny", {**TINY, "dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}, 64),
    "convnextv2": ("convnextv2_atto", TINY, 64),
    "mlp_mixer": ("mixer_s32_224", {**TINY, "num_blocks": 2, "embed_dim": 64, "img_size": 64}, 64),
}

# family: (class in transformers, class of its configuration, arguments)
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("ViTForImageClassification", "ViTConfig", {**HF, **MLP}),
    "ViT, features": ("ViTModel", "ViTConfig", {**HF, **MLP}),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", {**HF, **MLP}),
    "BeiT": ("BeitForImageClassification", "BeitConfig", {**HF, **MLP}),
    "Data2Vec": ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", {**HF, **MLP}),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2Config", {**HF, "patch_size": 16}),
    "DINOv2, registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {**HF, "patch_size": 16},
    ),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**HF, **MLP}),
    "ViTMSN": ("ViTMSNForImageClassification", "ViTMSNConfig", {**HF, **MLP}),
    "CLIP, vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**HF, **MLP}),
    "SigLIP": ("SiglipForImageClassification", "SiglipConfig", {"vision_config": {**HF, **MLP}, "num_labels": 10}),
    "Swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "num_labels": 10},
    ),
    "SwinV2": (
        "Swinv2ForImageClassification",
        "Swinv2Config",
        {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "num_labels": 10},
    ),
    "Hiera": (
        "HieraForImageClassification",
        "HieraConfig",
        {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "num_labels": 10},
    ),
    "PVTv2": (
        "PvtV2ForImageClassification",
        "PvtV2Config",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 32, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "num_labels": 10,
        },
    ),
    "SegFormer": (
        "SegformerForImageClassification",
        "SegformerConfig",
        {
            "hidden_sizes": [16, 32, 32, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "num_labels": 10,
        },
    ),
    "VideoMAE": ("VideoMAEForVideoClassification", "VideoMAEConfig", {**HF, **MLP, "num_frames": 4}),
}

# family: (function of torchvision.models, arguments, pixels)
TORCHVISION: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": (
        "VisionTransformer",
        {
            "image_size": 32,
            "patch_size": 8,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 64,
            "mlp_dim": 128,
            "num_classes": 10,
        },
        32,
    ),
    "swin": (
        "SwinTransformer",
        {
            "patch_size": [4, 4],
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "window_size": [4, 4],
            "num_classes": 10,
        },
        32,
    ),
    "swin v2": (
        "SwinTransformer",
        {
            "patch_size": [4, 4],
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "window_size": [4, 4],
            "num_classes": 10,
        },
        32,
    ),
    "convnext": ("convnext_tiny", {"num_classes": 10}, 64),
    "maxvit": (
        "MaxVit",
        {
            "input_size": (64, 64),
            "stem_channels": 16,
            "partition_size": 2,
            "block_channels": [16, 32],
            "block_layers": [1, 1],
            "head_dim": 8,
            "stochastic_depth_prob": 0.0,
            "num_classes": 10,
        },
        64,
    ),
}


class Family(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one image
    arguments: dict[str, Any] | None = None
    """What timm makes it from: what a file needs to say."""


def families() -> dict[str, Family]:
    """Those whose library is installed, by `library/family`."""
    found = {f"timm/{key}": _timm(*of) for key, of in TIMM.items()}
    found |= {f"torch/{key}": Family(make, (3, 32, 32)) for key, make in OWN.items()}
    for library, table in (("torchvision", TORCHVISION), ("transformers", TRANSFORMERS)):
        try:
            importlib.import_module(library)
        except ImportError:
            continue
        for key, of in table.items():
            found[f"{library}/{key}"] = (_torchvision if library == "torchvision" else _transformers)(key, *of)  # type: ignore[operator]
    return found


def redrawn(model: nn.Module) -> nn.Module:
    """Random weights under which answers depend on the images: libraries begin with zeros and faint ones."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        faint = parameter.ndim > 1
        mean = 0.0 if faint or parameter.mean() < 0.5 else 1.0  # of a norm
        std = parameter[0].numel() ** -0.5 if faint else 0.1
        parameter.data = mean + std * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def _timm(name: str, arguments: dict[str, Any], pixels: int) -> Family:
    from vitlr.checkpoint.creation import create_model

    arguments = {key: value for key, value in arguments.items() if value is not None}
    return Family(lambda: redrawn(create_model(name, **arguments)), (3, pixels, pixels), arguments)


def _torchvision(family: str, name: str, arguments: dict[str, Any], pixels: int) -> Family:
    def make() -> nn.Module:
        import torchvision.models as library
        from torchvision.models import swin_transformer

        more = dict(arguments)
        if family == "swin v2":
            more["block"] = swin_transformer.SwinTransformerBlockV2
            more["downsample_layer"] = swin_transformer.PatchMergingV2
        return redrawn(getattr(library, name)(**more))

    return Family(make, (3, pixels, pixels))


def _transformers(family: str, name: str, config: str, arguments: dict[str, Any]) -> Family:
    def make() -> nn.Module:
        import transformers as library

        return redrawn(getattr(library, name)(getattr(library, config)(**arguments)))

    size = arguments.get("image_size", arguments.get("vision_config", {}).get("image_size", 64))
    size = size[0] if isinstance(size, list) else size
    return Family(make, (4, 3, size, size) if family == "VideoMAE" else (3, size, size))


class Encoder(nn.Module):
    """A hand-written ViT on `nn.TransformerEncoder`."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 64, 8, 8)
        layer = nn.TransformerEncoderLayer(64, 2, 128, 0.0, activation="gelu", norm_first=True, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.patch_embed(images).flatten(2).mT).mean(1))


OWN = {"nn.TransformerEncoder": lambda: redrawn(Encoder())}
