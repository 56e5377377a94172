"""Levels of rounding: what is predicted before anything is rounded is what rounding does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vitlr
from vitlr.anatomy.reading import read
from vitlr.decomposition.levels import solve_levels
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.options import Decomposition
from vitlr.decomposition.roundings import Rounding
from vitlr.decomposition.sides import DAMPING, PRICED
from vitlr.errors import InputError
from vitlr.runtime import compact


@pytest.fixture(scope="module")
def solved(tiny_vit):
    model = tiny_vit(embed_dim=48, num_heads=3)
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(20)
    stats = vitlr.calibrate(model, images, objective="loss", extras=("rounding",), hidden=False)
    objective = Objective.of(stats, Decomposition())
    levels = solve_levels(list(stats.layers), read(model), stats, objective, {}, {}, {})
    return model, images, stats, {found.name: found.whole for found in levels}


def recorded(model: torch.nn.Module, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a linear reads, and a gradient by what it returns, one row a token."""
    seen: list[Tensor] = []
    linear = model.get_submodule(name)

    def hook(module: torch.nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        y.retain_grad()
        seen.extend((args[0], y))

    handle = linear.register_forward_hook(hook)
    model(images).square().sum().backward()
    handle.remove()
    return seen[0].detach().flatten(0, -2).double(), seen[1].grad.flatten(0, -2).double()


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2"])
def test_both_sides_are_measured_in_full(tiny_vit, batches, name):
    model = tiny_vit().double()
    images = torch.cat([x for x, _ in batches]).double()
    square = lambda output, batch: output.square().sum()  # noqa: E731
    stats = vitlr.calibrate(model, [images], objective="loss", extras=("rounding",), hidden=False, loss_fn=square)
    layer = stats.layers[name]
    x, g = recorded(model, name, images)
    inputs = layer.sum("input_moment" if layer.side == "output" else "moment")
    outputs = layer.sum("gradient" if layer.side == "output" else "output_gradient")
    torch.testing.assert_close(inputs, x.mT @ x)
    torch.testing.assert_close(outputs, g.mT @ g)


def moments(rounding: Rounding, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """S and C about the mean, damped, as the formula has them."""
    layer = rounding.sides.layer
    S = layer.sum("gradient" if layer.side == "output" else "output_gradient") / (2 * layer.tokens)
    C = layer.sum("input_moment" if layer.side == "output" else "moment")
    total = layer.sum("input_sum").double()
    C = (C - torch.outer(total, total) / layer.tokens) / 40
    return tuple(M + damping * M.diagonal().mean() * torch.eye(len(M)) for M in (S, C))


def test_bytes_and_loss_are_known_before_rounding(solved):
    for rounding in solved[3].values():
        (S, C), damped = moments(rounding, PRICED), moments(rounding)
        W = rounding.weight.double()
        for level in rounding.levels[8:20:6]:
            layer = rounding.rounded(level, rounding.weight, None)
            E = layer.dense_weight(torch.float64) - W
            true, asked = (float((S @ E @ C * E).sum()) for S, C in ((S, C), damped))
            size, loss = rounding.costs(level)
            uniform = float(W.numel() * 4 ** (level / 8) / 12)
            assert loss == pytest.approx(true, rel=0.1) and asked == pytest.approx(uniform, rel=0.25)
            parts = (part for t in layer.state_dict().values() for part in compact.stored(t).values())
            assert size == pytest.approx(sum(part.nbytes for part in parts), rel=0.03)


def test_some_columns_speak_for_all_even_where_one_is_far_larger(solved):
    known = solved[3]["blocks.1.mlp.fc2"]
    W = known.weight.clone()
    W[:, 0] *= 1e4  # no code of 8 bits holds it at the step of the others
    level, rounding = known.levels[16], replace(known, weight=W)
    _, whole = rounding.costs(level)
    assert rounding.costs(level, W.numel() // 4)[1] == pytest.approx(whole, rel=0.1)


def test_coarser_levels_are_smaller_and_lose_more(solved):
    for rounding in solved[3].values():
        sizes, losses = zip(*rounding.ladder.values(), strict=True)
        assert list(sizes) == sorted(sizes, reverse=True) and list(losses) == sorted(losses)
        assert [*rounding.ladder] == sorted(rounding.ladder)
        assert sizes[0] > 0.7 * rounding.weight.numel() and sizes[-1] < 0.3 * rounding.weight.numel() + 400


def test_making_up_for_errors_beats_rounding_to_the_nearest(solved):
    for rounding in solved[3].values():
        S, C = moments(rounding)
        level = rounding.levels[12]
        layer = rounding.rounded(level, rounding.weight, None)
        W = rounding.weight.double()
        steps = layer.dense_weight(torch.float64) / layer.codes.double().where(layer.codes != 0, torch.nan)
        steps = (steps.nanmean(1, keepdim=True) / steps.nanmean()) * steps.nanmean(0)
        nearest = (W / steps).round() * steps - W
        E = layer.dense_weight(torch.float64) - W
        assert (S @ E @ C * E).sum() < 0.9 * (S @ nearest @ C * nearest).sum()


def test_the_bias_carries_the_mean(solved):
    model, _, stats, roundings = solved
    rounding = roundings["blocks.0.mlp.fc1"]
    linear = model.get_submodule(rounding.name)
    layer = rounding.rounded(rounding.levels[-6], linear.weight, linear.bias)
    mean = stats.layers[rounding.name].sum("input_sum").float() / stats.layers[rounding.name].tokens
    with torch.no_grad():
        torch.testing.assert_close(layer(mean), linear(mean), rtol=1e-5, atol=1e-5)


def test_what_was_not_measured_is_refused(solved):
    model, images, _, _ = solved
    plain = vitlr.calibrate(model, images, objective="loss", hidden=False)
    with pytest.raises(InputError, match=r"no moments to round by .*extras=\('rounding',\)"):
        vitlr.plan(model, plain, "bytes:20%", method="bits")


def test_a_layer_that_nothing_depends_on_is_rounded_all_the_same(tiny_vit):
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.zero_()
    stats = vitlr.calibrate(model, [torch.randn(8, 3, 32, 32)], objective="loss", extras=("rounding",), hidden=False)
    small = vitlr.apply(model, vitlr.plan(model, stats, "bytes:20%", method="bits"))
    assert torch.isfinite(small(torch.randn(2, 3, 32, 32))).all()


def test_an_input_that_is_now_and_then_huge_costs_its_own_column_and_no_other(tiny_vit, tmp_path):
    model = tiny_vit(embed_dim=48, num_heads=3)
    with torch.no_grad():  # neuron 5: a thousand times what the others are, and its weights are none the smaller
        model.blocks[1].mlp.fc1.weight[5] *= 1000
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    stats = vitlr.calibrate(model, [images], objective="loss", extras=("rounding",), hidden=False)
    plan = vitlr.plan(model, stats, "bytes:24%", method="bits")
    small = vitlr.apply(model, plan)
    layer = small.blocks[1].mlp.fc2
    assert layer.twice.tolist() == [5]
    error = (layer.dense_weight() - model.blocks[1].mlp.fc2.weight).norm(dim=0)
    assert error[5] < 0.05 * error.median()
    own = next(found for found in plan.layers if found.name == "blocks.1.mlp.fc2")
    assert own.error < 0.2 * plan.error
    vitlr.save(small, tmp_path / "m")
    assert torch.equal(vitlr.load(tmp_path / "m")(images), small(images))
    assert (tmp_path / "m").stat().st_size <= plan.bytes_kept + 2**16
