"""Families whose blocks look otherwise export in int8 as well: windows, rotated queries, gates, convolutions."""

from __future__ import annotations

import pytest
import torch
from families import make

import vitlr
from vitlr.engines.export import export


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "eva02_base_patch14_224", "convnext_tiny"])
def test_every_layer_of_bytes_is_one_in_every_engine(name, tmp_path):
    model, images = make(name)
    model, images = model.float(), torch.randn(8, *images.shape[1:])
    stats = vitlr.calibrate(model, [images], objective="output", hidden=False, extras=("ranges",))
    done = export(model, tmp_path / "model.onnx", bits=8, stats=stats, images=images[:4])
    assert done.products >= len(stats.layers) - 2 and set(done.int8.values()) == {done.products}
