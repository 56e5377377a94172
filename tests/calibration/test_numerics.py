"""Numbers at the ends of their range: named, scaled, left out or warned of, never silently taken for zero."""

import logging

import pytest
import torch
from torch import nn

import vitlr
from vitlr.calibration.loop import calibrate
from vitlr.calibration.options import OBJECTIVES
from vitlr.errors import NumericalError
from vitlr.ops.linalg.factors import balance

STEPS = {"rank_step": 4}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named_under_every_objective(tiny_vit, images, objective, value):
    model = tiny_vit()
    model.blocks[1].mlp.fc1.weight.data[3, 2] = value
    model.head.weight.data[0, 0] = value
    with pytest.raises(NumericalError, match=r"blocks\.1\.mlp\.fc1\.weight holds NaN or Inf"):
        calibrate(model, [images], objective=objective)


@pytest.mark.parametrize("scale", [1e-26, 1e18])
def test_moments_of_tiny_and_huge_gradients_are_those_of_ordinary_ones_scaled(tiny_vit, images, scale):
    model = tiny_vit()
    options = {"objective": ["fisher"], "extras": ["row_gradient"], "hidden": True}
    ordinary, other = (
        calibrate(model, [images], loss_fn=lambda output, batch, s=s: s * output.square().sum(), **options)
        for s in (1.0, scale)
    )
    by_gradient = {"gradient", "image_moment", "image_gradient", "score_gradient", "row_gradient"}
    by_gradient |= {"image_input_moment", "image_input_sum", "image_output_gradient", "image_score_gradient"}
    for name, layer in ordinary.layers.items():
        for key, tensor in layer.sums():
            expected = tensor * (scale**2 if key in by_gradient or key == "image_score_moment" else 1)
            error = (other.layers[name].sum(key) - expected).abs().max() / expected.abs().max()
            assert float(error) < 1e-5, (name, key)
    plans = [vitlr.plan(model, stats, "params:70%", **STEPS) for stats in (ordinary, other)]
    assert plans[0].ranks == plans[1].ranks and plans[0].narrowed == plans[1].narrowed


def test_tiny_activations_leave_moments(tiny_vit, images):
    model = tiny_vit()
    model.blocks[0].mlp.fc2.bias.data.zero_()  # its outputs would be rounded against it
    expected = calibrate(model, [images], objective="output").layers["blocks.0.mlp.fc2"].moment
    model.blocks[0].mlp.fc2.weight.data *= 2.0**-80
    found = calibrate(model, [images], objective="output").layers["blocks.0.mlp.fc2"].moment
    torch.testing.assert_close(found * 2.0**160, expected)


@pytest.mark.parametrize("method", ["joint", None])
@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_an_mlp_that_is_dead_or_constant_is_left_out_and_said(tiny_vit, images, caplog, method, bias):
    model = tiny_vit()
    model.blocks[0].mlp.fc1.weight.data.zero_()
    model.blocks[0].mlp.fc1.bias.data.fill_(bias)
    stats = calibrate(model, [images])
    with caplog.at_level(logging.WARNING, "vitlr"):
        plan = vitlr.plan(model, stats, "params:70%", method=method, **STEPS)
    said = plan.why + caplog.text
    assert "1 left as wide as they are (MLP blocks.0.mlp" in said and "dead or constant" in said
    assert "blocks.0.mlp" not in plan.narrowed and "blocks.1.mlp" in plan.narrowed
    vitlr.apply(model, plan)


def test_where_every_mlp_is_dead_widths_are_refused(tiny_vit, images):
    model = tiny_vit()
    for block in model.blocks:
        block.mlp.fc1.weight.data.zero_()
        block.mlp.fc1.bias.data.zero_()
    with pytest.raises(NumericalError, match="dead or constant"):
        vitlr.plan(model, calibrate(model, [images]), "params:90%", method="widths")


def test_predictions_for_a_model_that_is_certain_of_everything_are_not_trusted(tiny_vit, images, caplog):
    model = tiny_vit()
    with caplog.at_level(logging.WARNING, "vitlr"):
        stats = calibrate(model, [images])
        assert "certain" not in stats.notes and "certain" not in caplog.text
        model.head.weight.data *= 1000
        stats = calibrate(model, [images])
    assert "certain of every answer" in caplog.text and stats.notes["certain"] < 1e-4
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vitlr"):
        vitlr.plan(model, stats, "params:70%", **STEPS)
        assert "not to be trusted" in caplog.text
        caplog.clear()
        vitlr.plan(model, stats, "params:70%", objective="output", **STEPS)
        assert not caplog.text


def test_balance_keeps_small_rows_beside_ones_that_are_1e16_times_as_large():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(24, 6, dtype=torch.float64, generator=generator)
    B = torch.randn(6, 20, dtype=torch.float64, generator=generator)
    A[::3] *= 1e16
    product = A @ B
    a, b = balance(A, B)
    error = (a @ b - product).norm(dim=1) / product.norm(dim=1)
    assert float(error.max()) < 1e-9
    assert float((a.norm() / b.norm()).log10().abs()) < 0.5


def test_what_is_written_into_a_layers_output_afterwards_changes_no_sums():
    """Products of outputs with gradients come in the backward pass, when an in-place activation has been by."""
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        hidden = nn.Linear(24, 16, bias=False)
        model = nn.Sequential(nn.Linear(8, 24), hidden, nn.ReLU(inplace=inplace), nn.Linear(16, 12), nn.Linear(12, 3))
        images = [torch.randn(4, 5, 8) for _ in range(3)]
        found.append(vitlr.calibrate(model, images, hidden=False).layers["1"])
    assert found[0].side == "output" and found[0].image_moment.any()
    for key in ("moment", "image_moment", "image_gradient"):
        torch.testing.assert_close(getattr(found[1], key), getattr(found[0], key), rtol=1e-5, atol=1e-9)


def test_hidden_neurons_that_hardly_vary_beside_their_mean_are_narrowed_in_spite_of_what_rounding_left(
    tiny_vit, images, caplog, monkeypatch
):
    """Deviations are a hundredth of the mean, in 32 directions of 128: the rest of Σ is rounding of either sign."""
    model, more = tiny_vit(), torch.cat([images, images.flip(0) * 0.7, images.roll(5, 3), images.neg()])
    fc1, fc2 = model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2
    fc1.weight.data.mul_(0.3 / fc1.weight.data.norm(dim=1, keepdim=True))
    fc1.bias.data.fill_(30.0)
    with torch.no_grad():
        fc2.bias.sub_(fc2.weight.sum(1) * 30.0)
    stats = calibrate(model, [more])
    assert stats.layers["blocks.0.mlp.fc2"].tokens > 128
    plan = vitlr.plan(model, stats, "params:70%", method="widths", width_step=16)
    assert "blocks.0.mlp" in plan.narrowed and not caplog.text.count("left as wide")
    width = next(row.width for row in plan.widths if row.name == "blocks.0.mlp")
    assert 32 <= width < 128  # nothing is lost down to there
    small, full = vitlr.apply(model, plan).blocks[0].mlp, model.blocks[0].mlp
    seen = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(more)
        exact = full(seen[0])
        # Sums in float32 have a part in it, by the order in which they add: 0.043 portable, 0.061 AVX2, 0.090 torch.
        assert (small(seen[0]) - exact).norm() < 0.1 * (exact - exact.mean((0, 1))).norm()
    monkeypatch.setattr("vitlr.decomposition.hidden_moments._FAINT", 0.0)
    with caplog.at_level(logging.WARNING, "vitlr"):
        alone = vitlr.plan(model, stats, "params:70%", method="joint", width_step=16, **STEPS)
    assert "blocks.0.mlp" not in alone.narrowed and "calibrate again in float32" in caplog.text
