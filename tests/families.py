"""Families of timm whose linears are counted, in float64: the small models of `bench/families`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
of_timm = pytest.importorskip("bench.families.of_timm", reason="bench/ is not beside the tests")
P14, P16 = of_timm.P14, of_timm.P16
BLOCK = 4  # qkv, proj, fc1, fc2

# family: targets, linears that the model as it stands reads past
COUNTS = {
    "ViT": (2 * BLOCK, 0),
    "DeiT": (2 * BLOCK, 0),
    "DeiT, distilled": (2 * BLOCK, 0),
    "DeiT III": (2 * BLOCK, 0),
    "DINOv2": (2 * BLOCK, 0),
    "DINOv2, registers": (2 * BLOCK, 0),
    "SigLIP": (2 * BLOCK + 4, 0),  # and kv, proj, fc1, fc2 of the attention pooling
    "CLIP": (2 * BLOCK, 0),
    "EVA02, base": (2 * 7, 0),  # q, k, v, proj, fc1_g, fc1_x, fc2
    "EVA02, tiny": (2 * BLOCK, 2),
    "EVA": (2 * BLOCK, 2),
    "BEiT": (2 * BLOCK, 2),
    "BEiTv2": (2 * BLOCK, 2),
    "DINOv3": (2 * BLOCK, 2),
    "ViT, rotary": (2 * BLOCK, 2),
    "Swin": (2 * BLOCK + 1, 0),  # and the reduction between the stages
    "SwinV2": (2 * BLOCK + 1, 2),
    "SwinV2, CR": (2 * BLOCK + 1, 0),
    "ConvNeXt, linears": (4 * 2, 0),
}
# name in timm: (arguments, targets, linears that the model as it stands reads past)
MODELS = {of_timm.MODELS[family][0]: (of_timm.MODELS[family][1], *counts) for family, counts in COUNTS.items()}
PIXELS = {of_timm.MODELS[family][0]: of_timm.MODELS[family][2] for family in COUNTS}


def arguments(name: str) -> tuple[dict, int]:
    """What timm makes the small model from, and its image size."""
    return dict(MODELS[name][0]), PIXELS[name]


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model in float64 with biases that matter, and two images."""
    args, size = arguments(name)
    model = timm.create_model(name, **args).eval()
    for parameter in model.parameters():  # timm starts with zero biases and faint weights, which would hide mistakes
        std = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, std=std)
    return model.double(), torch.randn(2, 3, size, size, dtype=torch.float64)
