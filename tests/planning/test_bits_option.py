"""bits=: how many bits a rounded weight is stored in, alone, within a budget of bytes and on top of any other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vitlr
from vitlr.errors import InputError
from vitlr.measuring import cost
from vitlr.nn import LowRankLinear, QuantizedLinear
from vitlr.planning.options import Planning

OVERHEAD = 64 * 2**10  # of a file: names and the plan


@pytest.fixture(scope="module")
def measured(tiny_vit):
    model = tiny_vit(embed_dim=48, num_heads=3).eval()
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    stats = vitlr.calibrate(model, images.split(20), objective="loss", extras=("rounding",), hidden=True)
    spectra = vitlr.plan(model, stats, "bytes:30%", method="mix").spectra
    return model, images, stats, spectra


@torch.no_grad()
def kl(model: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    p, q = model(images).log_softmax(-1), other(images).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("bits", [8, 6, 4, 3])
def test_bits_alone_round_every_layer_and_need_no_budget(measured, bits):
    model, images, stats, spectra = measured
    plan = vitlr.plan(model, stats, bits=bits, spectra=spectra)
    small = vitlr.apply(model, plan)
    assert plan.method == "bits" and set(plan.levels) == set(stats.layers) and "bits= was given" in plan.why
    for layer in plan.layers:
        stored = [8 * size / layer.params for size, _ in spectra.levels[layer.name].ladder().values()]
        assert layer.bits == pytest.approx(max(own for own in stored if own <= bits), abs=1e-3)
    assert cost.count_bytes(small) == pytest.approx(plan.bytes_kept, rel=0.03)
    assert kl(model, small, images) < {8: 1e-3, 6: 1e-3, 4: 0.02, 3: 0.1}[bits]


def test_under_bytes_each_layer_takes_one_of_the_bits_given(measured):
    model, _, stats, spectra = measured
    plan = vitlr.plan(model, stats, "bytes:17%", method="bits", bits=(6, 3), spectra=spectra)
    found = {min((3, 6), key=lambda bits, own=layer.bits: (bits < own, bits)) for layer in plan.layers}
    assert found == {3, 6} and set(plan.levels) == set(stats.layers) and plan.bytes_kept <= 0.17 * plan.bytes
    left = vitlr.plan(model, stats, "bytes:60%", method="bits", bits="16,3", spectra=spectra)
    assert 0 < len(left.levels) < len(left.layers)


@pytest.mark.parametrize(
    ("method", "budget"), [("lowrank", "params:60%"), ("widths", "macs:80%"), ("joint", "params:60%")]
)
def test_bits_come_on_top_of_what_another_budget_leaves(measured, tmp_path, method, budget):
    model, images, stats, _ = measured
    plain = vitlr.plan(model, stats, budget, method=method, attention="none" if method == "joint" else None)
    plan = vitlr.plan(model, stats, budget, method=method, bits=6)
    assert plan.ranks == plain.ranks and plan.narrowed == plain.narrowed and set(plan.levels) == set(stats.layers)
    assert (plan.params_kept, plan.macs_kept) == (plain.params_kept, plain.macs_kept)
    assert plan.bytes_kept < 0.3 * plain.bytes_kept and plan.error > plain.error
    small, x = vitlr.apply(model, plan), images[:6]
    assert cost.count_params(small) == plan.params_kept
    assert cost.count_bytes(small) == pytest.approx(plan.bytes_kept, rel=0.05)
    assert kl(vitlr.apply(model, plain), small, images) < 0.01
    vitlr.save(small, tmp_path / "m", plan=plan)
    loaded = vitlr.load(tmp_path / "m")
    assert torch.equal(loaded(x), small(x)) and (tmp_path / "m").stat().st_size <= plan.bytes_kept + OVERHEAD
    again = vitlr.apply(model, vitlr.Plan.from_json(plan.to_json()), stats)
    assert torch.equal(again(x), small(x))


def test_layers_of_two_factors_of_integers_are_layers(measured):
    model, images, stats, _ = measured
    small, x = vitlr.apply(model, vitlr.plan(model, stats, "params:60%", method="lowrank", bits=6)), images[:6]
    low = [module for module in small.modules() if isinstance(module, LowRankLinear)]
    assert low and all(isinstance(child, QuantizedLinear) for module in low for child in (module.down, module.up))
    expected = small(x)
    dense = vitlr.to_dense(small)
    assert not any(isinstance(module, (LowRankLinear, QuantizedLinear)) for module in dense.modules())
    torch.testing.assert_close(dense(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vitlr.unfuse(vitlr.fuse(small))(x), expected, rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    for other in (twin, compiled, torch.export.export(small, (x,)).module()):
        assert torch.equal(other(x), expected)


def test_the_budget_of_bytes_chooses_the_mix_where_both_sides_were_measured(measured):
    model, images, stats, spectra = measured
    plan = vitlr.plan(model, stats, "bytes:12%", spectra=spectra)
    assert plan.method == "mix" and "both sides" in plan.why
    plain = vitlr.calibrate(model, [images], objective="loss")
    assert vitlr.plan(model, plain, "bytes:60%").method == "joint"
    with pytest.raises(InputError, match="no moments to round by"):
        vitlr.plan(model, plain, "bytes:60%", bits=8)


@pytest.mark.parametrize(
    ("budget", "options", "words"),
    [
        (None, {"bits": (8, 4)}, "leaves a choice: give a budget of bytes"),
        ("params:60%", {"bits": (8, 4)}, "leaves a choice"),
        ("bytes:60%", {"bits": 1}, "expected whole numbers from 2 to 8"),
        ("bytes:60%", {"bits": "eight"}, "expected whole numbers from 2 to 8"),
        ("bytes:60%", {"bits": 16}, "expected whole numbers from 2 to 8"),
        ("bytes:60%", {"bits": ()}, "expected whole numbers from 2 to 8"),
        ("bytes:5%", {"bits": 4}, r"cannot be reached .*smallest plan keeps"),
        ("params:60%", {"bits": 8, "method": "joint", "attention": "heads"}, "does not go with attention="),
        ("bytes:60%", {"bits": 8, "uniform": True}, "does not go with bits="),
        (None, {"bits": 8, "method": "lowrank"}, "give a budget"),
    ],
)
def test_bits_that_go_nowhere_are_refused_in_one_line(measured, budget, options, words):
    model, _, stats, _ = measured
    with pytest.raises(InputError, match=words) as error:
        vitlr.plan(model, stats, budget, **options)
    assert "\n" not in str(error.value)


def test_bits_that_a_layer_cannot_take_are_refused_with_what_it_takes(tiny_vit):
    model = tiny_vit(embed_dim=12, num_heads=3).eval()  # so small that two bits a weight do not hold the steps
    stats = vitlr.calibrate(model, [torch.randn(8, 3, 32, 32)], objective="loss", extras=("rounding",), hidden=True)
    with pytest.raises(InputError, match=r"layer blocks\.0\.\S+: bits=2 cannot be reached, .*stores \d+\.\d\d bits"):
        vitlr.plan(model, stats, bits=2)
    assert set(vitlr.plan(model, stats, "bytes:90%", method="bits", bits=(16, 2)).levels) < set(stats.layers)


def test_options_are_read_as_numbers_words_and_lists():
    assert Planning(bits=8).stored == (8,) and Planning(bits="8,4").stored == Planning(bits=[4, 8]).stored == (8, 4)
    assert Planning().stored == ()
