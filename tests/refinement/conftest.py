"""A tiny dense ViT, a compressed copy of it, and images to refine on."""

from __future__ import annotations

import copy

import pytest
import torch

import vitlr


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def proxy_images() -> list[torch.Tensor]:
    """Sixty images in ragged batches: coarse patterns, so that crops of them look like them."""
    coarse = torch.randn(60, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return list(torch.nn.functional.interpolate(coarse, 32, mode="bicubic").split([25, 25, 10]))


@pytest.fixture(scope="session")
def _pair(proxy_images):
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    dense = vitlr.create_model("vit_tiny_patch16_224", **args)
    for p in dense.parameters():
        p.data += torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    dense.head.weight.data *= 4  # answers that care
    stats = vitlr.calibrate(dense, proxy_images, objective="loss", hidden=False)
    return dense, vitlr.apply(dense, vitlr.plan(dense, stats, "params:45%", rank_step=1))


@pytest.fixture
def pair(_pair):
    """(dense, compressed): a model that has lost more than half of its parameters, and its original."""
    return copy.deepcopy(_pair)


@pytest.fixture
def quick() -> dict:
    """Choices with which every rung takes a fraction of a second."""
    quick = {"steps": 24, "every": 8, "batch_size": 8, "lr": 1e-3, "warmup": 2, "ema": 0.8, "amp": False}
    return {**quick, "regrow_steps": 30, "proxy_images": 32}
