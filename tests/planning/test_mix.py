"""Widths and bits in one plan: what is predicted, and the model that comes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitlr
from vitlr.decomposition.sides import PRICED
from vitlr.errors import InputError
from vitlr.measuring import cost
from vitlr.nn import QuantizedLinear
from vitlr.planning.plans import Plan
from vitlr.runtime import compact

OVERHEAD = 64 * 2**10  # of a file: names and the plan


@pytest.fixture(scope="module")
def measured(tiny_vit):
    model = tiny_vit(embed_dim=48, num_heads=3).eval()
    with torch.no_grad():  # trained networks have neurons that matter and neurons that do not
        for block in model.blocks:
            block.mlp.fc2.weight *= torch.logspace(0.5, -2, 192)[torch.randperm(192, generator=_seeded(2))]
    images = torch.randn(40, 3, 32, 32, generator=_seeded(1))
    stats = vitlr.calibrate(model, images.split(20), objective="loss", extras=("rounding",), hidden=True)
    return model, images, stats, vitlr.plan(model, stats, "bytes:12%", method="mix").spectra


@pytest.fixture(scope="module")
def mixed(measured):
    model, images, stats, spectra = measured
    plan = vitlr.plan(model, stats, "bytes:11%", method="mix", spectra=spectra)
    return plan, vitlr.apply(model, plan), images[:6]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(*weight.shape[::-1], bias is not None)
    layer.weight.data, layer.bias = weight, bias if bias is None else nn.Parameter(bias)
    return layer


@torch.no_grad()
def kl(model: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    p, q = model(images).log_softmax(-1), other(images).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_plan_holds_widths_and_bits_and_the_file_takes_what_it_says(measured, mixed, tmp_path):
    _, _, stats, _ = measured
    plan, small, x = mixed
    assert plan.narrowed and set(plan.levels) == set(stats.layers)
    assert plan.bytes_kept <= 0.11 * plan.bytes and plan.params_kept == cost.count_params(small) < plan.params
    assert cost.count_bytes(small) == pytest.approx(plan.bytes_kept, rel=0.03)
    assert cost.measure(small, (3, 32, 32)).macs == plan.macs_kept
    assert sum(isinstance(module, QuantizedLinear) for module in small.modules()) == 8
    vitlr.save(small, tmp_path / "m", plan=plan)
    assert (tmp_path / "m").stat().st_size <= plan.bytes_kept + OVERHEAD
    assert torch.equal(vitlr.load(tmp_path / "m")(x), small(x))
    assert torch.equal(vitlr.to_dense(small)(x), small(x))


def test_the_mix_never_predicts_more_loss_than_bits_alone(measured):
    model, _, stats, spectra = measured
    for share in (8, 9, 11, 14, 20):
        mix, bits = (
            vitlr.plan(model, stats, f"bytes:{share}%", method=method, spectra=spectra) for method in ("mix", "bits")
        )
        assert mix.error <= bits.error * (1 + 1e-9)


def test_the_mix_loses_less_than_bits_alone_where_bytes_are_few(measured):
    model, images, stats, spectra = measured
    mix, bits = (vitlr.plan(model, stats, "bytes:9%", method=method, spectra=spectra) for method in ("mix", "bits"))
    assert mix.error < 0.95 * bits.error
    assert kl(model, vitlr.apply(model, mix), images) < kl(model, vitlr.apply(model, bits), images)


def test_levels_between_the_widths_that_were_tried_cost_what_rounding_there_costs(measured):
    *_, spectra = measured
    for block, width in (("blocks.0.mlp", 80), ("blocks.1.mlp", 144)):
        narrowing = spectra.widths[block]
        keep, (V, _) = narrowing.keep(width), narrowing.weights(width)
        for name in (*narrowing.first, narrowing.second):
            levels = spectra.levels[name]
            weight = V if name == narrowing.second else levels.whole.weight[keep]
            for level in [*levels.ladder()][6:20:6]:
                size, loss = levels.ladder(width)[level]
                layer = levels.rounded(level, linear(weight.float(), None), width)
                sides = levels.whole.sides
                sides = sides.among(None, keep) if name == narrowing.second else sides.among(keep, None)
                S, C = sides.moments(PRICED)
                E = layer.dense_weight(torch.float64) - weight.double()
                parts = (part for t in layer.state_dict().values() for part in compact.stored(t).values())
                assert size == pytest.approx(sum(part.nbytes for part in parts), rel=0.05)
                assert loss == pytest.approx(float((S @ E @ C * E).sum()), rel=0.25)


def test_the_bias_carries_the_mean_of_the_neurons_that_stay(measured):
    *_, spectra = measured
    narrowing = spectra.widths["blocks.0.mlp"]
    V, bias = narrowing.weights(96)
    levels = spectra.levels[narrowing.second]
    layer = levels.rounded([*levels.ladder()][-6], linear(V.float(), bias.float()), 96)
    mean = narrowing.moments.mean[narrowing.keep(96)]
    expected = V @ mean + bias
    torch.testing.assert_close(layer(mean.float()).double(), expected, rtol=1e-4, atol=1e-4)


def test_plans_are_kept_as_json_and_applied_with_the_statistics(measured, mixed):
    model, _, stats, _ = measured
    plan, small, x = mixed
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json() and again.to_dict()["schema"] == 4
    assert torch.equal(vitlr.apply(model, again, stats)(x), small(x))
    assert "level" in str(plan) and "MLPs narrowed" in str(plan)


def test_all_the_bytes_change_nothing(measured):
    model, images, stats, spectra = measured
    plan = vitlr.plan(model, stats, "bytes:100%", method="mix", spectra=spectra)
    assert not plan.changes and torch.equal(vitlr.apply(model, plan)(images), model(images))


def test_what_does_not_go_together_is_refused(measured):
    model, images, stats, spectra = measured
    for budget, options, words in (
        ("params:40%", {}, "changes bytes only"),
        (None, {}, "give a budget"),
        ("bytes:1%", {}, "cannot be reached"),
        ("bytes:20%", {"uniform": True}, "goes with method='lowrank' only"),
        ("bytes:20%", {"objective": "normalized"}, "normalized"),
    ):
        with pytest.raises(InputError, match=words):
            vitlr.plan(model, stats, budget, method="mix", spectra=spectra, **options)
    plain = vitlr.calibrate(model, [images], objective="loss")
    with pytest.raises(InputError, match=r"calibrate with extras=\('rounding',\)"):
        vitlr.plan(model, plain, "bytes:20%", method="mix")


def test_compress_measures_what_it_needs(measured):
    model, images, *_ = measured
    small = vitlr.compress(model, [images], "bytes:11%", method="mix")
    assert sum(isinstance(module, QuantizedLinear) for module in small.modules()) == 8
    assert small.vitlr_info["plan"]["method"] == "mix"


def test_bytes_alone_are_enough_for_weights_to_be_rounded(tiny_vit, tmp_path):
    model = tiny_vit(embed_dim=48, num_heads=3)
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    small = vitlr.compress(model, [images], "bytes:12%", stats=tmp_path / "s")
    assert any(isinstance(module, QuantizedLinear) for module in small.modules())
    plain = vitlr.calibrate(model, [images], objective="loss")  # a file without both sides serves ranks and widths
    plain.save(tmp_path / "old")
    narrowed = vitlr.compress(model, [images], "bytes:60%", stats=tmp_path / "old")
    assert not any(isinstance(module, QuantizedLinear) for module in narrowed.modules())
    refitted = vitlr.compress(model, [images], "bytes:60%", rungs="refit")  # moves weights, so that none may be integers
    assert not any(isinstance(module, QuantizedLinear) for module in refitted.modules())
