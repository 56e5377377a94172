"""Budgets of milliseconds: priced by a table of times, here one that a clock of modules gives."""

from __future__ import annotations

import json

import pytest
import torch
from fake_clock import FakeClock

import vitlr
from vitlr.anatomy.reading import read
from vitlr.errors import InputError
from vitlr.measuring import clock, cost
from vitlr.nn import Int8Linear, LowRankLinear
from vitlr.planning.options import Planning
from vitlr.planning.pace import clocked, shapes_of
from vitlr.planning.plans import Plan

STEPS = {"rank_step": 4, "width_step": 16}
TOKENS = 17


@pytest.fixture(scope="module")
def measured(tiny_vit):
    torch.manual_seed(0)
    model = tiny_vit(embed_dim=48, num_heads=3).eval()
    images = [torch.randn(16, 3, 32, 32) for _ in range(3)]
    return model, vitlr.calibrate(model, images), vitlr.calibrate(model, images, extras=("ranges",))


@pytest.fixture(autouse=True)
def ticking(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = FakeClock(TOKENS)
    monkeypatch.setattr(clock, "race", fake)
    return fake


def ms(model, batch_size=2):
    return FakeClock(TOKENS).ms(model, torch.zeros(batch_size, 3, 32, 32))


@pytest.mark.parametrize("share", [90, 75, 60])
@pytest.mark.parametrize("method", [None, "lowrank", "widths", "widths+ranks"])
def test_a_plan_of_floats_promises_what_the_model_then_takes(measured, method, share):
    model, stats, _ = measured
    plan = vitlr.plan(model, stats, f"latency:{share}%", method=method, batch_size=2, **STEPS)
    small = vitlr.apply(model, plan)
    assert plan.latency.dense_ms == pytest.approx(ms(model), rel=1e-3)
    assert plan.latency.promised_ms == pytest.approx(ms(small), rel=0.01)
    assert plan.latency.promised_ms <= share / 100 * plan.latency.dense_ms * 1.001
    assert not plan.bytes_layers and plan.changes
    found = cost.measure(small, (3, 32, 32))
    assert (plan.params_kept, plan.macs_kept, plan.bytes_kept) == (found.params, found.macs, found.bytes)


def test_milliseconds_are_a_budget_too_and_the_best_plan_within_it_is_taken(measured):
    model, stats, _ = measured
    share = vitlr.plan(model, stats, "latency:70%", batch_size=2, **STEPS)
    dense = share.latency.dense_ms
    plan = vitlr.plan(model, stats, f"latency:{0.7 * dense:.6f}ms", batch_size=2, **STEPS, spectra=share.spectra)
    assert plan.ranks == share.ranks and plan.narrowed == share.narrowed
    more = vitlr.plan(model, stats, "latency:80%", batch_size=2, **STEPS, spectra=share.spectra)
    assert 0 < more.error < share.error
    whole = vitlr.plan(model, stats, f"latency:{dense + 1}ms", batch_size=2, **STEPS, spectra=share.spectra)
    assert not whole.changes and whole.error == 0


def test_with_ranges_layers_may_multiply_bytes_and_do_before_anything_is_cut(measured):
    model, _, stats = measured
    plan = vitlr.plan(model, stats, "latency:60%", batch_size=2, **STEPS)
    assert plan.bytes_layers and not plan.ranks and not plan.narrowed
    floats = vitlr.plan(model, measured[1], "latency:60%", batch_size=2, **STEPS)
    assert plan.error < 0.3 * floats.error
    for mlp in read(model).mlps.values():  # of which each is one operation
        assert len({name in plan.bytes_layers for name in mlp.linears}) == 1
    tight = vitlr.plan(model, stats, "latency:22%", batch_size=2, **STEPS, spectra=plan.spectra)
    assert len(tight.bytes_layers) == len(tight.layers) and (tight.ranks or tight.narrowed)
    rows = {layer.name: layer for layer in tight.layers}
    assert all(rows[name].reason.startswith("int8: ") for name in tight.bytes_layers)


def test_bytes_of_a_plan_are_those_of_the_model_that_multiplies_them(measured):
    model, _, stats = measured
    plan = vitlr.plan(model, stats, "latency:30%", batch_size=2, method="lowrank", **STEPS)
    small = vitlr.apply(model, plan)
    assert plan.ranks and plan.bytes_layers
    for name in plan.bytes_layers:
        for part in ("down", "up") if isinstance(small.get_submodule(name), LowRankLinear) else ("",):
            linear = small.get_submodule(f"{name}.{part}".rstrip("."))
            bytes_ = Int8Linear(linear.in_features, linear.out_features)
            small.set_submodule(f"{name}.{part}".rstrip("."), bytes_)
    assert (cost.count_bytes(small), cost.count_params(small)) == (plan.bytes_kept, plan.params_kept)
    assert FakeClock(TOKENS).ms(small, torch.zeros(2, 3, 32, 32)) == pytest.approx(plan.latency.promised_ms, rel=0.01)


def test_where_low_rank_is_slower_layers_stay_dense_and_the_plan_says_so(measured, monkeypatch):
    model, stats, _ = measured
    monkeypatch.setattr(clock, "race", FakeClock(TOKENS, slow_ranks=20.0))
    plan = vitlr.plan(model, stats, "latency:80%", batch_size=2, **STEPS)
    assert not plan.ranks and plan.narrowed
    assert {layer.reason for layer in plan.layers if "attn" in layer.name} == {"dense: low rank is slower here"}
    with pytest.raises(
        InputError, match=r"latency:60% cannot be reached with method='lowrank'.*keeps 100\.00%.* ms of"
    ):
        vitlr.plan(model, stats, "latency:60%", batch_size=2, method="lowrank", **STEPS, spectra=plan.spectra)


def test_layers_left_out_keep_their_form(measured):
    model, _, stats = measured
    plan = vitlr.plan(model, stats, "latency:70%", batch_size=2, exclude=r"\.qkv$", **STEPS)
    left = [layer for layer in plan.layers if layer.name.endswith("qkv")]
    assert left and all(row.rank is None and not row.int8 and "left out" in row.reason for row in left)


def test_times_are_those_of_the_batch_and_the_threads_asked_for(measured, ticking):
    model, stats, _ = measured
    one, two = (vitlr.plan(model, stats, "latency:70%", batch_size=n, threads=1, **STEPS) for n in (1, 2))
    assert ticking.threads == {1} and (two.latency.batch_size, two.latency.threads) == (2, 1)
    assert two.latency.dense_ms == pytest.approx(2 * one.latency.dense_ms, rel=1e-3)
    assert any(f"rows={2 * TOKENS}" in name for name in ticking.raced)
    assert vitlr.plan(model, stats, "latency:70%", **STEPS, times=one.times, threads=1).ranks == one.ranks
    with pytest.raises(InputError, match="these times are of 1 images on 1 threads, the plan is for 3 on 1"):
        vitlr.plan(model, stats, "latency:70%", times=one.times, batch_size=3, threads=1)


def test_the_dtype_of_the_model_is_what_is_timed(measured, ticking):
    model, stats, _ = measured
    times = clocked(vitlr.unfuse(model).bfloat16(), stats, Planning(batch_size=1))
    assert times.dtype == "bfloat16" and all("bfloat16" in name for name in ticking.raced if name != "dense")


def test_a_plan_comes_back_from_its_file_and_says_what_it_promised(measured, tmp_path, images):
    model, _, stats = measured
    plan = vitlr.plan(model, stats, "latency:40%", batch_size=2, **STEPS)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan and again.to_json() == plan.to_json() and json.loads(plan.to_json())["schema"] == 5
    assert torch.equal(vitlr.apply(model, again, stats)(images), vitlr.apply(model, plan)(images))
    assert "promised; batch 2" in str(plan) and "multiply bytes" in str(plan)
    body = plan.to_dict()
    for broken in ({**body["latency"], "threads": 0}, {**body["latency"], "dense_ms": "x"}, {}):
        with pytest.raises(InputError, match="not a vitlr plan"):
            Plan.from_dict({**body, "latency": broken})


def test_mlps_with_a_gate_are_timed_linear_by_linear(tiny_vit):
    from timm.layers import SwiGLUPacked

    model = tiny_vit(embed_dim=48, num_heads=3, mlp_layer=SwiGLUPacked).eval()
    stats = vitlr.calibrate(model, [torch.randn(16, 3, 32, 32) for _ in range(3)], extras=("ranges",))
    shapes = shapes_of(read(model), stats, 1)
    assert {len(shape.sizes) for shape in shapes.values()} == {2}
    assert shapes["blocks.0.mlp.fc1"].narrows == 1 and shapes["blocks.0.mlp.fc2"].narrows == 0
    plan = vitlr.plan(model, stats, "latency:20%", batch_size=2, **STEPS)
    assert plan.latency.promised_ms <= 0.2 * plan.latency.dense_ms and plan.narrowed


def test_mlps_by_other_names_are_timed_as_the_one_operation_that_fuse_makes_of_them(ticking):
    transformers = pytest.importorskip("transformers")
    config = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**config, image_size=32, patch_size=8)).eval()
    stats = vitlr.calibrate(model, [torch.randn(16, 3, 32, 32) for _ in range(3)])
    mlps = {name: shape for name, shape in shapes_of(read(model), stats, 1).items() if ".mlp." in name}
    assert len(mlps) == 4 and {(shape.sizes, shape.act) for shape in mlps.values()} == {((48, 192, 48), "gelu")}
    plan = vitlr.plan(model, stats, "latency:60%", batch_size=2, **STEPS)
    small = vitlr.apply(model, plan)
    assert plan.latency.promised_ms == pytest.approx(ms(small), rel=0.01) and plan.narrowed


@pytest.mark.parametrize(
    ("budget", "options", "words"),
    [
        ("latency:3%", {}, r"latency:3% cannot be reached .*smallest plan keeps \d+\.\d+% \(\S+ ms of \S+ ms"),
        ("latency:50%", {"bits": 4}, "bits=4 counts stored bytes, and codes run no faster; leave it out"),
        ("latency:50%", {"method": "mix"}, "method='mix' counts stored bytes"),
        ("latency:50%", {"attention": "heads"}, "attention='heads' is not timed"),
        ("latency:50%", {"uniform": True}, "uniform=True does not go with a budget of latency"),
        ("latency:50%", {"rank_buckets": 2}, "rank_buckets= does not go with"),
        ("latency:50%", {"ranks": {"blocks.0.attn.qkv": 8}}, "ranks= does not go with"),
        ("latency:50%", {"prune_rate": 0.2, "method": "widths+ranks"}, "prune_rate= does not go with"),
        ("latency:50%", {"threads": 5000}, r"threads=5000: this process may use \d+ cores"),
        ("latency:50%", {"threads": 0}, "threads=0, expected a whole number from 1"),
        ("latency:50%", {"batch_size": 0}, "batch_size=0, expected a whole number from 1"),
        ("latency:50%", {"batch_size": 1.5}, "batch_size=1.5, expected a whole number"),
        ("params:50%", {"batch_size": 8}, "batch_size= goes with a budget of latency"),
        ("params:50%", {"threads": 1}, "threads= goes with a budget of latency"),
    ],
)
def test_what_goes_nowhere_is_refused_in_one_line(measured, budget, options, words):
    model, stats, _ = measured
    with pytest.raises(InputError, match=words) as error:
        vitlr.plan(model, stats, budget, **options)
    assert "\n" not in str(error.value)


def test_a_model_elsewhere_than_on_the_cpu_is_refused(measured):
    model, stats, _ = measured
    with pytest.raises(InputError, match="the model is on meta, and a budget of milliseconds is measured on the CPU"):
        vitlr.plan(vitlr.unfuse(model).to("meta"), stats, "latency:50%")
