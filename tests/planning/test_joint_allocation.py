"""Widths and ranks under one budget: what a plan says is what the model then is, and the joint one loses least."""

import json
from dataclasses import replace

import pytest
import torch

import vitlr
from vitlr.anatomy import reading
from vitlr.anatomy.mlps import find_mlps
from vitlr.checkpoint import files
from vitlr.checkpoint.structure import structure
from vitlr.decomposition.baselines import svd
from vitlr.errors import InputError
from vitlr.measuring import cost
from vitlr.nn import LowRankLinear
from vitlr.planning.knapsack import Prices, worth_having
from vitlr.planning.options import Planning
from vitlr.planning.plans import LayerPlan, Plan

STEPS = {"rank_step": 4, "width_step": 8}
METHODS = {
    "widths": {"method": "widths"},
    "alone": {"method": "widths", "compensate": False},
    "widths+ranks": {"method": "widths+ranks"},
    "published": {"method": "widths+ranks", "prune_rate": 0.3},
    "joint": {"method": "joint"},
}


@pytest.fixture(scope="module")
def calibrated(tiny_vit):
    torch.manual_seed(0)
    model = tiny_vit()
    images = [torch.randn(16, 3, 32, 32) for _ in range(3)]
    return model, vitlr.calibrate(model, images, hidden=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["params:70%", "macs:72%", "bytes:71%"])
def test_a_plan_is_what_the_model_then_costs(calibrated, images, method, budget):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, budget, **STEPS, **METHODS[method])
    small = vitlr.apply(model, plan)
    measured = cost.measure(small, (3, 32, 32))
    assert (plan.params_kept, plan.macs_kept, plan.bytes_kept) == (measured.params, measured.macs, measured.bytes)
    quantity = budget.partition(":")[0]
    assert getattr(plan, f"{quantity}_kept") <= vitlr.parse_budget(budget).limit(getattr(plan, quantity))
    assert plan.narrowed and all(width % 8 == 0 for width in plan.narrowed.values())
    ranked = {name for name, module in small.named_modules() if isinstance(module, LowRankLinear)}
    assert ranked == plan.ranks.keys()
    if method != "joint":
        assert not any("mlp" in name for name in ranked)
    read = Plan.from_json(plan.to_json())
    assert read == plan and torch.equal(vitlr.apply(model, read, stats)(images), small(images))


@pytest.mark.parametrize("budget", ["params:90%", "params:70%", "params:50%", "macs:60%", "bytes:60%"])
def test_joint_predicts_no_more_than_each_method_alone(calibrated, budget):
    model, stats = calibrated
    methods = ("lowrank", "widths+ranks", "joint")
    errors = {m: vitlr.plan(model, stats, budget, **STEPS, method=m).error for m in methods}
    assert errors["joint"] <= min(errors.values()) * (1 + 1e-9)
    if budget != "params:50%":  # widths alone reach less far
        assert errors["joint"] <= vitlr.plan(model, stats, budget, **STEPS, method="widths").error * (1 + 1e-9)


def test_both_in_one_mlp(calibrated, images):
    """A tight budget narrows and factorises; the prediction of a layer's rank is that of its compensated weights."""
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:45%", **STEPS, method="joint")
    both = [row for row in plan.layers if row.rank is not None and (row.kept_in or row.kept_out)]
    assert both and all(row.error > 0 for row in both)
    small = vitlr.apply(model, plan)
    for row in both:
        layer = small.get_submodule(row.name)
        assert (layer.out_features, layer.in_features, layer.rank) == (*row.shape, row.rank)


def test_first_linears_keep_rows_of_the_dense_factors(calibrated):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:60%", **STEPS, method="widths")
    row = next(row for row in plan.layers if row.name.endswith("fc1") and row.kept_out)
    ranked = tuple(replace(r, rank=4) if r is row else r for r in plan.layers)
    plan, row = replace(plan, layers=ranked), replace(row, rank=4)
    spectrum = plan.spectra.widths[row.name.removesuffix(".fc1")]
    linear = model.get_submodule(row.name)
    A, B, _ = plan.spectra.layers[row.name].factors(linear.weight, row.rank, linear.bias)
    small = vitlr.apply(model, plan).get_submodule(row.name)
    keep = spectrum.keep(row.kept_out)
    assert torch.allclose(small.up.weight @ small.down.weight, (A[keep] @ B).float(), atol=1e-6)
    assert torch.equal(small.up.bias, linear.bias[keep])


def test_saved_models_and_plans_know_widths(calibrated, images, tmp_path):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:55%", **STEPS, method="joint")
    small = vitlr.apply(model, plan)
    for name, network in {"plain": small, "fused": vitlr.fuse(small, fold=False)}.items():
        files.save(network, tmp_path / f"{name}.safetensors", plan=plan)
        loaded = files.load(tmp_path / f"{name}.safetensors")
        assert torch.equal(loaded(images), network(images))
        assert Plan.from_dict(loaded.vitlr_info["plan"]) == plan
        assert structure(loaded) == structure(small)
    assert "width" in str(plan) and "MLPs narrowed" in str(plan)


def test_a_rate_is_of_all_hidden_neurons_and_needs_no_budget(calibrated):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, method="widths", prune_rate=0.4, width_step=8)
    kept = sum(mlp.width for mlp in plan.widths)
    assert 0.6 * 256 - 8 < kept <= 0.6 * 256 and not plan.ranks
    hybrid = vitlr.plan(model, stats, "params:60%", method="widths+ranks", prune_rate=0.4, **STEPS)
    assert {m.name: m.width for m in hybrid.widths} == {m.name: m.width for m in plan.widths}
    assert hybrid.ranks and all("attn" in name for name in hybrid.ranks)


def test_floors_and_full_widths_are_reported(calibrated):
    model, stats = calibrated
    least = vitlr.plan(model, stats, method="widths", prune_rate=0.93, width_step=8)
    assert {mlp.width for mlp in least.widths} == {8}
    assert all("floor" in mlp.reason for mlp in least.widths)
    with pytest.raises(InputError, match=r"prune_rate=0.95 cannot be reached: 16 of 256 hidden neurons must stay"):
        vitlr.plan(model, stats, method="widths", prune_rate=0.95, width_step=8)
    with pytest.raises(InputError, match=r"params:10% cannot be reached with method='widths'.* keeps 5"):
        vitlr.plan(model, stats, "params:10%", method="widths")
    wide = vitlr.plan(model, stats, "params:100%", method="joint", width_step=128)
    assert not wide.changes and all("no multiple of 128" in mlp.reason for mlp in wide.widths)
    out = vitlr.plan(model, stats, "params:90%", method="joint", exclude="blocks.0", **STEPS)
    left = {mlp.name: mlp.width for mlp in out.widths if mlp.reason == "full: left out by include/exclude"}
    assert left == {"blocks.0.mlp": 128, "blocks.0.attn": 32}
    odd = vitlr.plan(model, stats, "params:80%", method="widths", width_step=50)
    assert {mlp.width for mlp in odd.widths} <= {50, 100, 128}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "both"}, "unknown method 'both'"),
        ({"method": "widths", "prune_rate": 0.3}, "not both"),
        ({"method": "joint", "prune_rate": 0.3}, r"goes with method='widths' or 'widths\+ranks'"),
        *[
            ({"method": "widths+ranks", "prune_rate": rate}, "between 0 and 1")
            for rate in (0, 1, -0.5, 40, float("nan"))
        ],
        ({"method": "joint", "width_step": 0}, "width_step=0"),
        ({"method": "joint", "width_step": 2.5}, "width_step=2.5"),
        ({"method": "joint", "rank_step": 0}, "rank_step=0"),
        ({"method": "joint", "min_rank": -1}, "min_rank=-1"),
        ({"method": "joint", "width_scale": 0.0}, "width_scale=0.0"),
        ({"method": "joint", "uniform": True}, "uniform=True goes with method='lowrank'"),
        ({"method": "widths", "ranks": {"x": 3}}, "ranks= goes with"),
        ({"method": "widths+ranks", "rank_buckets": 2}, "rank_buckets= goes with"),
        ({"method": "joint", "centred": True}, "centred=True goes with"),
        ({"method": "joint", "ridge": 0.0}, "ridge"),
    ],
)
def test_options_that_make_no_sense(calibrated, options, said):
    model, stats = calibrated
    with pytest.raises(InputError, match=said):
        vitlr.plan(model, stats, "params:60%", **options)


def test_compress_measures_what_the_method_needs(tiny_vit, batches):
    model = tiny_vit()
    small = vitlr.compress(model, batches, "params:70%", method="joint", **STEPS)
    assert cost.count_params(small) <= 0.7 * cost.count_params(model)
    assert any("width" in entry for entry in structure(small).values())
    images = [torch.randn(40, 3, 32, 32)]
    better = vitlr.compress(
        model, images, "params:80%", method="widths", rungs="distil", steps=2, every=1, batch_size=8, **STEPS
    )
    assert [rung.name for rung in better.vitlr_refinement.rungs] == ["refit", "distil"]
    pruned = vitlr.compress(model, batches, method="widths", prune_rate=0.5, **STEPS)
    assert {entry.keys() == {"width"} for entry in structure(pruned).values()} == {True}


def test_compress_refuses_bad_options_before_any_image(tiny_vit):
    def unread():
        raise AssertionError("too late")
        yield

    for options, said in (
        ({"method": "joint", "ridge": -1.0}, "ridge"),
        ({"method": "joint", "objective": "normalized"}, "normalized"),
        ({"method": "widths+ranks", "prune_rate": 2.0}, "prune_rate"),
        ({"prune_rate": 0.5}, "goes with"),
    ):
        with pytest.raises(InputError, match=said):
            vitlr.compress(tiny_vit(), unread(), "params:60%", **options)


def test_plans_of_ranks_are_written_as_before(calibrated):
    model, stats = calibrated
    body = vitlr.plan(model, stats, "params:70%", method="lowrank", rank_step=4).to_dict()
    assert body["schema"] == 1 and not {"method", "widths", "ridge", "compensated"} & body.keys()
    assert set(body["layers"][0]) == {"name", "in_features", "out_features", "rank", "tokens", "error", "reason"}
    assert Plan.from_dict(body).method == "lowrank"


def test_plans_from_anywhere_are_checked(calibrated):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:45%", **STEPS, method="joint")
    for change in (
        lambda body: body.update(method="magic"),
        lambda body: body["widths"][0].update(width=0),
        lambda body: body["widths"][0].update(width=10**9),
        lambda body: body["widths"][0].update(width="8"),
        lambda body: body["layers"][2].update(kept_out=10**9),
        lambda body: body["layers"][2].update(kept_out=1, rank=2),
        lambda body: body.pop("widths"),
    ):
        body = json.loads(plan.to_json())
        change(body)
        with pytest.raises(InputError):
            Plan.from_dict(body)
    body = json.loads(plan.to_json())
    body["widths"][0]["name"] = "blocks.7.mlp"
    with pytest.raises(InputError, match="another model"):
        vitlr.apply(model, Plan.from_dict(body), stats)


def test_the_optionsworth_having():
    import numpy as np

    cost, loss = np.array([3.0, 1.0, 2.0, 2.0, 4.0, 1.0]), np.array([1.0, 5.0, 5.0, 2.0, 1.0, 6.0])
    assert worth_having(Prices(cost, loss)).tolist() == [1, 3, 0]


def test_layer_rows_count_what_is_kept():
    row = LayerPlan("fc1", 10, 40, 2, 3.0, 0.0, "", kept_out=16)
    assert row.shape == (16, 10) and row.params == 2 * 26 and row.macs == 3 * 52


def test_the_best_method_is_the_default_and_the_plan_says_why(calibrated, batches):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:70%", **STEPS)
    asked = vitlr.plan(model, stats, "params:70%", **STEPS, method="joint")
    assert plan == asked and plan.method == "joint" and not asked.why
    assert "method joint: the hidden neurons of 2 MLPs were measured" in str(plan).splitlines()
    assert "why" not in plan.to_dict() and "method joint:" not in str(asked)
    bare = vitlr.calibrate(model, batches, hidden=False)
    plan = vitlr.plan(model, bare, "params:70%", rank_step=4)
    assert plan.method == "lowrank" and plan == vitlr.plan(model, bare, "params:70%", rank_step=4, method="lowrank")
    assert plan.why.startswith("these statistics hold no hidden moments (blocks.0.mlp); calibrate with hidden=True")
    parts = vitlr.calibrate(model, batches, exclude="blocks.0.mlp.fc1|blocks.1.mlp.fc2", hidden=False)
    assert "none of the 2 MLPs" in vitlr.plan(model, parts, "params:90%", rank_step=4).why
    small = vitlr.calibrate(model, batches, hidden_memory=1000)  # what calibration could not have
    assert "more than hidden_memory=1,000" in vitlr.plan(model, small, "params:90%", rank_step=4).why


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"uniform": True}, "uniform=True goes with no other"),
        ({"rank_buckets": 2}, "rank_buckets= goes with no other"),
        ({"centred": True, "objective": "loss"}, "centred=True goes with no other"),
        ({"objective": "normalized"}, "objective='normalized' goes with no other"),
    ],
)
def test_what_only_ranks_have_settles_the_method(tiny_vit, batches, options, why):
    model = tiny_vit()
    stats = vitlr.calibrate(model, batches, objective=("fisher", "loss", "normalized"), hidden=True)
    plan = vitlr.plan(model, stats, "params:70%", rank_step=4, **options)
    assert plan.method == "lowrank" and plan.why == why and not plan.widths


def test_spectra_of_other_methods_are_of_ranks(calibrated):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:70%", rank_step=4, spectra=svd(model, stats))
    assert plan.method == "lowrank" and "objective 'svd' is of ranks alone" in plan.why
    with pytest.raises(InputError, match="objective 'svd' is of ranks alone"):
        vitlr.plan(model, stats, "params:70%", method="widths", spectra=svd(model, stats))


def test_spectra_of_a_plan_serve_the_next_one(calibrated):
    model, stats = calibrated
    first = vitlr.plan(model, stats, "params:70%", **STEPS)
    seen = []
    again = {**STEPS, "spectra": first.spectra, "progress": lambda *done: seen.append(done)}
    second = vitlr.plan(model, stats, "params:60%", **again)
    assert not seen and second == vitlr.plan(model, stats, "params:60%", **STEPS)
    third = vitlr.plan(model, stats, "params:60%", **again, compensate=False)
    assert seen == [(0, 2), (1, 2), (2, 2)]  # the MLPs again; layers, queries and keys are as they were
    assert third == vitlr.plan(model, stats, "params:60%", **STEPS, compensate=False)


def test_progress_counts_layers_mlps_and_attentions_in_one_go(calibrated):
    model, stats = calibrated
    seen = []
    vitlr.plan(model, stats, "params:70%", **STEPS, progress=lambda *done: seen.append(done))
    assert seen == [(done, 8 + 2 + 2) for done in range(13)]


def test_options_as_a_value_are_the_keywords(calibrated):
    model, stats = calibrated
    options = Planning(method="widths", width_step=8)
    plan = vitlr.plan(model, stats, "params:70%", options=options)
    assert plan == vitlr.plan(model, stats, "params:70%", method="widths", width_step=8)
    finer = vitlr.plan(model, stats, "params:70%", options=options, width_step=4)
    assert finer == vitlr.plan(model, stats, "params:70%", method="widths", width_step=4)
    with pytest.raises(InputError, match=r"unknown option 'rank_stepp', expected some of .*rank_step"):
        vitlr.plan(model, stats, "params:70%", options=options, rank_stepp=4)
    hidden = [Planning(**o).hidden for o in ({}, {"method": "lowrank"}, {"uniform": True}, {"attention": "heads"})]
    assert hidden == [True, False, False, "attention"]


def test_old_words_are_taken_and_read_and_no_longer_written(calibrated, images):
    model, stats = calibrated
    for old, new in (("prune", "widths"), ("hybrid", "widths+ranks")):
        plan = vitlr.plan(model, stats, "params:70%", **STEPS, method=old)
        assert plan.method == new and plan == vitlr.plan(model, stats, "params:70%", **STEPS, method=new)
    plan = vitlr.plan(model, stats, "params:60%", **STEPS, method="prune", attention="scores")
    assert plan.attention == "query_keys" and "scores" not in plan.to_json()
    body = plan.to_dict()
    body["method"] = "prune"
    for row in body["widths"]:
        row["kind"] = row["kind"].replace("query_keys", "scores")
    read = Plan.from_dict(body)
    assert read == plan and torch.equal(vitlr.apply(model, read, stats)(images), vitlr.apply(model, plan)(images))


def test_a_plan_looks_for_mlps_once(calibrated, monkeypatch):
    model, stats = calibrated
    traced = []
    monkeypatch.setattr(reading, "find_mlps", lambda model: traced.append(model) or find_mlps(model))
    vitlr.plan(model, stats, "params:70%", **STEPS)
    assert len(traced) == 1
    vitlr.plan(model, stats, "params:70%", method="lowrank", rank_step=4)
    assert len(traced) == 1  # ranks need none
