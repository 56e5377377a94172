"""A small ViT, images it was calibrated on, and packages without which nothing is exported."""

from __future__ import annotations

import pytest
import torch

import vitlr
from vitlr.nn import LowRankLinear
from vitlr.runtime.modules import swap


@pytest.fixture(scope="session", autouse=True)
def _installed():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def many():
    """24 images."""
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vit(tiny_vit):
    """One block."""
    return tiny_vit(depth=1)


@pytest.fixture(scope="module")
def stats(vit, many):
    return vitlr.calibrate(vit, many.split(8), hidden=False, extras=("ranges",))


@pytest.fixture(scope="module")
def low(vit):
    """The same at low rank."""
    small = vitlr.to_dense(vit)
    for name in ("attn.qkv", "mlp.fc1", "mlp.fc2"):
        swap(small, f"blocks.0.{name}", LowRankLinear.from_linear(small.get_submodule(f"blocks.0.{name}"), 8))
    return small.eval()


@pytest.fixture(scope="module")
def low_stats(low, many):
    return vitlr.calibrate(low, many.split(8), objective="output", hidden=False, extras=("ranges",))
