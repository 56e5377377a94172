"""Weights rounded to 8-bit floats by the loss: on the grid, less lost than by the nearest, and what is refused."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitlr
from vitlr.calibration.statistics import LayerStatistics
from vitlr.decomposition import fp8_rounding
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.options import Decomposition
from vitlr.decomposition.sides import Sides
from vitlr.errors import InputError
from vitlr.nn import Fp8Block, Fp8Linear
from vitlr.ops.layers.fp8_chain import FP8, reach_of, step_of
from vitlr.surgery.fusion import fuse


@pytest.fixture(scope="module")
def images():
    return torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    nn.init.normal_(vit.head.weight, std=0.2)
    return vit.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def stats(model, images):
    return vitlr.calibrate(model, images.split(8), extras=("rounding",))


def test_steps_times_whole_numbers_are_8_bit_floats():
    W = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)).double() ** 3
    W[3] = 0
    scale = torch.linspace(0.01, 1.0, 20).double()
    scale = torch.maximum(scale, W.abs().amax(1) / 448)
    step = fp8_rounding.steps(W, scale)
    for number in range(17):
        value = (number * step / scale[:, None]).float()
        value = value[value <= 448]
        assert torch.equal(value.to(FP8).float(), value)
    assert ((W / step).abs() <= 16).all(), "the nearest of them is among them"


def test_every_linear_loses_less_than_by_the_nearest(model, stats):
    objective = Objective.of(stats, Decomposition())
    for name, layer in stats.layers.items():
        linear = model.get_submodule(name)
        S, C = Sides(layer, objective, linear.bias is not None).moments(0.1)
        near, ours = step_of(linear.weight, linear.bias), fp8_rounding.rounded(linear, layer, objective)
        near, lost = (
            float((S @ E @ C * E).sum())
            for E in (
                step.codes.double() * step.scale.double()[:, None] - linear.weight.double() for step in (near, ours)
            )
        )
        assert lost < 0.7 * near, name
        assert torch.equal(ours.reach, reach_of(ours.codes, ours.scale, ours.bias))
        assert not ours.codes.float().isnan().any()


def test_the_mean_output_stays(model, stats):
    objective, name = Objective.of(stats, Decomposition()), "blocks.1.mlp.fc2"
    linear, layer = model.get_submodule(name), stats.layers[name]
    mean = layer.sum("input_sum").double() / layer.tokens
    step = fp8_rounding.rounded(linear, layer, objective)
    found = (step.codes.double() * step.scale.double()[:, None]) @ mean + step.bias.double()
    torch.testing.assert_close(found, linear.weight.double() @ mean + linear.bias.double(), rtol=1e-5, atol=1e-6)


def test_one_huge_input_does_not_take_over(stats):
    layer = stats.layers["blocks.0.mlp.fc2"]
    objective = Objective.of(stats, Decomposition())
    sums = dict(layer.held)
    key = "input_moment" if layer.side == "output" else "moment"
    sums[key] = layer.sum(key).clone()
    sums[key][5, 5] *= 1e6
    wild = LayerStatistics(layer.name, layer.in_features, layer.out_features, layer.owner, layer.tokens, **sums)
    for most, shares in ((10.0, (0.0, 0.2)), (float("inf"), (0.9, 1.0))):
        _, C = Sides(wild, objective, True, most=most).moments(0.0)
        assert shares[0] <= float(C[5, 5] / C.trace()) <= shares[1]


@torch.no_grad()
def test_a_model_rounded_by_its_statistics_is_nearer_to_the_dense_one(model, images, stats):
    told = []
    plain = fuse(model, bits="fp8")
    small = fuse(model, bits="fp8", stats=stats, progress=lambda done, total: told.append((done, total)))
    assert all(type(block) is Fp8Block for block in small.blocks) and told[-1] == (8, 8)
    assert sum(isinstance(m, Fp8Linear) for m in small.modules()) == 8
    others = torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    # Rows are rounded by both, so weights are compared alone.
    exact = model(others)
    near, ours = ((vitlr.to_dense(m)(others) - exact).norm() for m in (plain, small))
    assert ours < 0.8 * near


def test_statistics_without_sides_and_of_other_weights_are_refused(model, images, stats):
    ranges = vitlr.calibrate(model, images[:8].split(8), objective="output", extras=("ranges",))
    with pytest.raises(InputError, match=r'no sides to round by: calibrate\(..., extras=\("rounding",\)\)'):
        fuse(model, bits="fp8", stats=ranges)
    with pytest.raises(InputError, match="go together"):
        fuse(model, stats=stats)
    with pytest.raises(InputError):
        fuse(VisionTransformer(img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=3), bits="fp8", stats=stats)
