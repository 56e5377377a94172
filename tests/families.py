"""The families of timm that vitlr supports, each at a size that runs in milliseconds."""

import timm
import torch
from torch import nn

VIT = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
P16, P14 = {**VIT, "img_size": 32}, {**VIT, "img_size": 28}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "img_size": 32, "window_size": 4, "num_classes": 5}
BLOCK = 4  # qkv, proj, fc1, fc2

# name: (arguments, targets, linears that the model as it stands reads past)
MODELS = {
    "vit_tiny_patch16_224": (P16, 2 * BLOCK, 0),
    "deit_tiny_patch16_224": (P16, 2 * BLOCK, 0),
    "deit_tiny_distilled_patch16_224": (P16, 2 * BLOCK, 0),
    "deit3_small_patch16_224": (P16, 2 * BLOCK, 0),
    "vit_small_patch14_dinov2": (P14, 2 * BLOCK, 0),
    "vit_small_patch14_reg4_dinov2": (P14, 2 * BLOCK, 0),
    "vit_base_patch16_siglip_224": (P16, 2 * BLOCK + 4, 0),  # and kv, proj, fc1, fc2 of the attention pooling
    "vit_base_patch16_clip_224": (P16, 2 * BLOCK, 0),
    "eva02_base_patch14_224": (P14, 2 * 7, 0),  # q, k, v, proj, fc1_g, fc1_x, fc2
    "eva02_tiny_patch14_224": (P14, 2 * BLOCK, 2),
    "eva_giant_patch14_224": (P14, 2 * BLOCK, 2),
    "beit_base_patch16_224": (P16, 2 * BLOCK, 2),
    "beitv2_base_patch16_224": (P16, 2 * BLOCK, 2),
    "vit_small_patch16_dinov3_qkvb": (P16, 2 * BLOCK, 2),
    "vit_base_patch16_rope_reg1_gap_256": (P16, 2 * BLOCK, 2),
    "swin_tiny_patch4_window7_224": (SWIN, 2 * BLOCK + 1, 0),  # and the reduction between the stages
    "swinv2_tiny_window8_256": (SWIN, 2 * BLOCK + 1, 2),
    "swinv2_cr_tiny_ns_224": (SWIN, 2 * BLOCK + 1, 0),
    "convnext_tiny": ({"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_classes": 5, "img_size": 32}, 4 * 2, 0),
}


def arguments(name: str) -> tuple[dict, int]:
    """What timm makes the small model from, and its image size."""
    args = dict(MODELS[name][0])
    size = args["img_size"]
    if name == "convnext_tiny":  # takes any size
        del args["img_size"]
    return args, size


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model in float64 with biases that matter, and two images."""
    args, size = arguments(name)
    model = timm.create_model(name, **args).eval()
    for parameter in model.parameters():  # timm starts with zero biases and faint weights, which would hide mistakes
        std = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, std=std)
    return model.double(), torch.randn(2, 3, size, size, dtype=torch.float64)
