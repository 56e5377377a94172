"""Blocks by their names in several libraries, and looking at a network on the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitlr
from vitlr.refinement.blocks import block_of, by_block, lowrank_layers, run_until, tensor_of, watched


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("blocks.3.mlp.fc1", "blocks.3"),
        ("layers.2.blocks.5.attn.qkv", "layers.2.blocks.5"),
        ("layers.1.downsample.reduction", "layers.1"),
        ("encoder.layers.encoder_layer_3.mlp.0", "encoder.layers.encoder_layer_3"),
        ("vit.encoder.layer.11.attention.attention.query", "vit.encoder.layer.11"),
        ("mlp.fc1", "mlp.fc1"),
        ("head", "head"),
    ],
)
def test_the_block_around_a_layer(layer, block):
    assert block_of(layer) == block


def test_blocks_are_seen_and_passes_end_where_asked(pair):
    _, small = pair
    blocks = by_block(lowrank_layers(small))
    assert list(blocks) == ["blocks.0", "blocks.1"]
    seen = {}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), watched(small, list(blocks), lambda name, x, y: seen.__setitem__(name, (x, y))):
        run_until(small, x, "blocks.0")
        assert list(seen) == ["blocks.0"]
        small(x)
    assert torch.equal(seen["blocks.0"][1], seen["blocks.1"][0])
    assert not any(module._forward_hooks for module in small.modules())


def test_the_hidden_states_are_the_first_of_several():
    y = torch.ones(2)
    assert tensor_of((y, None)) is y and tensor_of([(y,)]) is y


def test_a_family_with_windows_and_stages_is_refined(quick):
    """Swin: windows multiply the leading dimension, stages differ in width."""
    args = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
    dense = vitlr.create_model("swin_tiny_patch4_window7_224", num_classes=5, **args)
    dense.head.fc.weight.data.normal_()
    images = list(torch.randn(40, 3, 32, 32).split(20))
    small = vitlr.compress(dense, images, "params:60%", method="lowrank", rank_step=1)
    assert len(by_block(lowrank_layers(small))) >= 2
    refined = vitlr.refine(small, dense, images, rungs="distil", **quick)
    rungs = refined.vitlr_refinement.rungs
    assert [rung.name for rung in rungs] == ["refit", "regrow", "distil"] and any(rung.kept for rung in rungs)
    assert isinstance(refined, nn.Module) and torch.isfinite(refined(images[0])).all()
