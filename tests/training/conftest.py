"""A tiny ViT and labelled images that it can learn within a few updates."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import vitlr

CLASSES = 4


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dataset() -> TensorDataset:
    """Forty-eight images of four classes, each brightest in a quarter of its own."""
    draw = torch.Generator().manual_seed(3)
    labels = torch.arange(48) % CLASSES
    images = torch.randn(48, 3, 32, 32, generator=draw) * 0.3
    for image, label in zip(images, labels.tolist(), strict=True):
        y, x = divmod(label, 2)
        image[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] += 1
    return TensorDataset(images, labels)


@pytest.fixture
def loader(dataset):
    """A function that makes a shuffled loader."""
    return lambda **options: DataLoader(dataset, **{"batch_size": 8, "shuffle": True, **options})


@pytest.fixture
def vit():
    """A function that makes the tiny model, the same every time."""

    def make(**options):
        torch.manual_seed(0)
        args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
        return vitlr.create_model("vit_tiny_patch16_224", **{**args, **options})

    return make


@pytest.fixture
def quick() -> dict:
    """Choices with which a training takes a second."""
    return {"epochs": 3, "lr": 2e-3, "warmup_epochs": 0.5, "amp": False}
