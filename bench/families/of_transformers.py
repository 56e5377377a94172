"""Families of transformers: (class of the model, class of its configuration, arguments)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from bench.families.family import Family

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
VIT = {**SIZE, "intermediate_size": 64, "num_labels": 5}
RATIO = {**SIZE, "mlp_ratio": 2, "num_labels": 5, "patch_size": 16}
SWIN = {
    "image_size": 32,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
    "num_labels": 5,
}
PYRAMID = {
    "hidden_sizes": [16, 32, 32, 64],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    "num_labels": 5,
}
HIERA = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "image_size": [64, 64], "num_labels": 5}
SAM = {**SIZE, "mlp_dim": 64, "output_channels": 16, "global_attn_indexes": [1], "window_size": 2, "num_pos_feats": 8}
SAM |= {"patch_size": 8, "image_size": 64}
LEVIT = {
    "image_size": 64,
    "hidden_sizes": [16, 32, 48],
    "num_attention_heads": [2, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
    "num_labels": 5,
    "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 4, 4, 2, 2]],
}
MOBILE = {"image_size": 64, "num_labels": 5}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("ViTForImageClassification", "ViTConfig", VIT),
    "ViT, features": ("ViTModel", "ViTConfig", VIT),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", VIT),
    "DeiT, distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT),
    "BEiT": ("BeitForImageClassification", "BeitConfig", {**VIT, "use_relative_position_bias": True}),
    "Data2Vec": ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", VIT),
    "Data2Vec, biases": (
        "Data2VecVisionForImageClassification",
        "Data2VecVisionConfig",
        {**VIT, "use_relative_position_bias": True},
    ),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2Config", RATIO),
    "DINOv2, gated": ("Dinov2ForImageClassification", "Dinov2Config", {**RATIO, "use_swiglu_ffn": True}),
    "DINOv2, registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", RATIO),
    "DINOv3": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        VIT,
    ),
    "ViTMSN": ("ViTMSNForImageClassification", "ViTMSNConfig", VIT),
    "I-JEPA": ("IJepaForImageClassification", "IJepaConfig", VIT),
    "CLIP": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**VIT, "projection_dim": 16}),
    "OWLv2": ("Owlv2VisionModel", "Owlv2VisionConfig", {**VIT, "patch_size": 16}),
    "SigLIP": ("SiglipForImageClassification", "SiglipConfig", {"vision_config": VIT, "num_labels": 5}),
    "SigLIP, features": ("SiglipVisionModel", "SiglipVisionConfig", VIT),
    "Swin": ("SwinForImageClassification", "SwinConfig", SWIN),
    "SwinV2": ("Swinv2ForImageClassification", "Swinv2Config", SWIN),
    "Hiera": ("HieraForImageClassification", "HieraConfig", HIERA),
    "PVTv2": ("PvtV2ForImageClassification", "PvtV2Config", {**PYRAMID, "image_size": 64}),
    "SegFormer": ("SegformerForImageClassification", "SegformerConfig", PYRAMID),
    "SegFormer, segmentation": ("SegformerForSemanticSegmentation", "SegformerConfig", PYRAMID),
    "SAM": ("SamVisionModel", "SamVisionConfig", SAM),
    "VitDet": ("VitDetModel", "VitDetConfig", {**SIZE, "mlp_ratio": 2, "patch_size": 16}),
    "YOLOS": ("YolosForObjectDetection", "YolosConfig", {**VIT, "image_size": [32, 32]}),
    "VideoMAE": ("VideoMAEForVideoClassification", "VideoMAEConfig", {**VIT, "num_frames": 4}),
    "LeViT": ("LevitForImageClassification", "LevitConfig", LEVIT),
    "MobileViT": ("MobileViTForImageClassification", "MobileViTConfig", MOBILE),
    "PoolFormer": (
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        {k: PYRAMID[k] for k in ("hidden_sizes", "depths", "num_labels")},
    ),
}


def families() -> Iterator[tuple[str, Family]]:
    for family, (name, config, arguments) in MODELS.items():
        size = arguments.get("image_size", arguments.get("vision_config", {}).get("image_size", 64))
        size = size[0] if isinstance(size, list) else size
        shape = (3, size, size)
        yield family, Family(partial(_build, name, config, arguments), (4, *shape) if family == "VideoMAE" else shape)


def _build(name: str, config: str, arguments: dict[str, Any]) -> Any:
    import transformers

    return getattr(transformers, name)(getattr(transformers, config)(**arguments))
