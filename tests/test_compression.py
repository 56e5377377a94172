"""From a model and images to a smaller model, through the public functions."""

import copy
import inspect

import pytest
import torch
from torch import nn

import vitlr
from vitlr import InputError, LowRankLinear, LowRankMLP, Plan, Statistics
from vitlr.calibration.options import Calibration
from vitlr.checkpoint.structure import restructure, structure
from vitlr.compression import compressed
from vitlr.measuring import cost
from vitlr.planning.options import Planning
from vitlr.refinement import Recipe
from vitlr.surgery.fusion import fused_names


@pytest.fixture
def calibrated(tiny_vit, batches):
    model = tiny_vit()
    return model, vitlr.calibrate(model, batches, objective=("loss", "normalized"), hidden=False)


def logits(model, batches):
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in batches])


@pytest.mark.parametrize("objective", ["loss", "output", "normalized"])
@pytest.mark.parametrize("budget", ["params:70%", "macs:75%", "bytes:75%"])
def test_the_model_costs_what_the_plan_says(calibrated, batches, budget, objective):
    model, stats = calibrated
    before = copy.deepcopy(model.state_dict())
    plan = vitlr.plan(model, stats, budget, objective=objective, rank_step=4)
    small = vitlr.apply(model, plan)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    measured = cost.measure(small, (3, 32, 32))
    assert measured.params == plan.params_kept and measured.bytes == plan.bytes_kept
    assert measured.macs == pytest.approx(plan.macs_kept, abs=len(plan.layers))
    quantity = budget.split(":")[0]
    assert getattr(measured, quantity) <= float(budget.split(":")[1][:-1]) / 100 * getattr(plan, quantity)
    assert torch.isfinite(logits(small, batches)).all()


def test_more_budget_means_less_error(calibrated, batches):
    model, stats = calibrated
    dense = logits(model, batches)
    errors = []
    for share in (60, 75, 90, 100):
        plan = vitlr.plan(model, stats, f"params:{share}%", rank_step=2)
        errors.append((plan.error, float((logits(vitlr.apply(model, plan), batches) - dense).square().mean())))
    assert errors == sorted(errors, reverse=True) and errors[-1] == (0.0, 0.0)


def test_one_calibration_serves_any_budget_without_solving_again(calibrated):
    model, stats = calibrated
    first = vitlr.plan(model, stats, "params:70%", rank_step=4)
    second = vitlr.plan(model, stats, "params:80%", rank_step=4, spectra=first.spectra)
    assert second.to_json() == vitlr.plan(model, stats, "params:80%", rank_step=4).to_json()
    for other in ({"objective": "output"}, {"centred": True}, {"damping": 5.0}):
        with pytest.raises(InputError, match="spectra"):
            vitlr.plan(model, stats, "params:80%", spectra=first.spectra, **other)


def test_a_plan_from_json_needs_the_statistics_and_gives_the_same_model(calibrated, batches, tmp_path):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:70%", rank_step=4)
    plan.save(tmp_path / "plan.json")
    stats.save(tmp_path / "stats.safetensors")
    read, loaded = Plan.load(tmp_path / "plan.json"), Statistics.load(tmp_path / "stats.safetensors")
    with pytest.raises(InputError, match="statistics"):
        vitlr.apply(model, read)
    assert torch.equal(logits(vitlr.apply(model, read, loaded), batches), logits(vitlr.apply(model, plan), batches))


def test_plans_and_statistics_of_another_model_are_refused(calibrated, tiny_vit, batches):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:70%", rank_step=4)
    for other in (tiny_vit(seed=7), tiny_vit(depth=1), tiny_vit(embed_dim=64), nn.Linear(3, 3)):
        with pytest.raises(InputError):
            vitlr.apply(other, plan)
        with pytest.raises(InputError):
            vitlr.plan(other, stats, "params:70%")
    small = vitlr.apply(model, plan)
    with pytest.raises(InputError):
        vitlr.apply(small, plan)


def test_frozen_layers_stay_frozen_and_hooks_are_not_lost_in_silence(calibrated):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:70%", rank_step=4)
    name = next(iter(plan.ranks))
    model.get_submodule(name).requires_grad_(False)
    small = vitlr.apply(model, plan).get_submodule(name)
    assert not any(p.requires_grad for p in small.parameters())
    handle = model.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="hooks"):
        vitlr.apply(model, plan)
    handle.remove()


def test_a_compressed_model_made_dense_is_compressed_again(calibrated, batches):
    model, stats = calibrated
    dense = vitlr.to_dense(vitlr.apply(model, vitlr.plan(model, stats, "params:60%", rank_step=2)))
    again = vitlr.compress(dense, batches, budget="params:60%", rank_step=2)
    assert cost.count_params(again) <= 0.6 * cost.count_params(dense)


def test_in_place_is_in_place(calibrated, batches):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:70%", rank_step=4)
    expected = logits(vitlr.apply(model, plan), batches)
    assert vitlr.apply(model, plan, inplace=True) is model
    assert torch.equal(logits(model, batches), expected)


def test_centred_plans_move_the_mean_into_the_bias(calibrated, batches):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:70%", objective="output", centred=True, rank_step=4)
    small = vitlr.apply(model, plan)
    assert cost.count_params(small) == plan.params_kept
    name = next(iter(plan.ranks))
    assert not torch.allclose(small.get_submodule(name).up.bias, model.get_submodule(name).bias)


def test_compress_is_all_of_it_and_checks_the_budget_first(tiny_vit, batches):
    model = tiny_vit()
    small = vitlr.compress(model, batches, budget="params:70%", rank_step=4)
    assert any(isinstance(m, LowRankLinear) for m in small.modules())

    def no_images():
        raise AssertionError("an image was read")
        yield

    with pytest.raises(InputError, match="budget"):
        vitlr.compress(model, no_images(), budget="params:nonsense")
    for bad in ({"rank_step": 0}, {"uniform": True, "rank_buckets": 2}, {"damping": -1.0}, {"objective": "best"}):
        with pytest.raises(InputError):
            vitlr.compress(model, no_images(), budget="params:70%", **bad)
    with pytest.raises(InputError, match="budget"):
        vitlr.compress(model, no_images())
    with pytest.raises(InputError, match="rank_stepp"):
        vitlr.compress(model, no_images(), budget="params:70%", rank_stepp=4)


def test_dense_again_is_the_same_function(calibrated, batches):
    model, stats = calibrated
    small = vitlr.fuse(vitlr.apply(model, vitlr.plan(model, stats, "params:70%", rank_step=4)))
    dense = vitlr.to_dense(small)
    assert not any(isinstance(m, (LowRankLinear, LowRankMLP)) for m in dense.modules())
    assert fused_names(small) and cost.count_params(dense) == cost.count_params(model)
    torch.testing.assert_close(logits(dense, batches), logits(small, batches), rtol=1e-4, atol=1e-4)


def test_fuse_is_exact_and_reversible(calibrated, batches):
    model, stats = calibrated
    small = vitlr.apply(model, vitlr.plan(model, stats, "params:70%", rank_step=4))
    fused = vitlr.fuse(small, fold=False)
    back = vitlr.unfuse(fused)
    assert {"blocks.0.mlp", "blocks.1.mlp"} <= set(fused_names(fused)) and not fused_names(small)
    assert list(fused.state_dict()) == list(small.state_dict())
    assert [type(m) for m in back.modules()] == [type(m) for m in small.modules()]
    for other in (fused, back):
        assert torch.equal(logits(other, batches), logits(small, batches))


def test_structure_describes_and_restructure_rebuilds(calibrated, tiny_vit, batches):
    model, stats = calibrated
    small = vitlr.apply(model, vitlr.plan(model, stats, "params:70%", rank_step=4))
    rebuilt = restructure(tiny_vit(seed=3), structure(small))
    rebuilt.load_state_dict(small.state_dict())
    assert torch.equal(logits(rebuilt, batches), logits(small, batches))
    name, entry = next(iter(structure(small).items()))
    for bad in ({"nothing": entry}, {name: {**entry, "rank": 10**9}}, {name: {**entry, "in_features": 1}}, {name: 3}):
        with pytest.raises(InputError):
            restructure(tiny_vit(), bad)


def test_a_compressed_model_can_be_compressed_further(calibrated, batches):
    """Factors that are there already stay as they are; the layers that stayed dense are calibrated again."""
    model, stats = calibrated
    first = vitlr.apply(model, vitlr.plan(model, stats, "params:85%", rank_step=4, include="fc1"))
    again = vitlr.compress(first, batches, budget="params:90%", rank_step=4)
    assert cost.count_params(again) <= 0.9 * cost.count_params(first)


def test_compress_refines_with_the_same_images(tiny_vit):
    model, images = tiny_vit(), [torch.randn(40, 3, 32, 32)]
    options = {"rank_step": 4, "steps": 4, "every": 2, "batch_size": 8, "lr": 1e-3, "seed": 1}
    small = vitlr.compress(model, images, "params:60%", rungs=["distil"], **options)
    (rung,) = small.vitlr_refinement.rungs
    assert rung.name == "distil" and rung.steps == 4
    before = {name: p.clone() for name, p in model.named_parameters()}
    again = vitlr.compress(model, images, "params:60%", rungs=["distil"], inplace=True, **options)
    assert again is model and set(dict(model.named_parameters())) != set(before)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    dense = vitlr.compress(tiny_vit(), images, "params:100%", rungs="distil")
    assert not hasattr(dense, "vitlr_refinement")


def test_compress_refuses_bad_refinement_before_any_image(tiny_vit):
    def unread():
        raise AssertionError("too late")
        yield

    for options, said in (
        ({"rungs": "all"}, "rung"),
        ({"steps": 0}, "steps"),
        ({"rungs": "distil"}, "uses this loader"),
    ):
        with pytest.raises(InputError, match=said):
            vitlr.compress(tiny_vit(), unread(), "params:60%", **options)
    with pytest.raises(InputError, match="every parameter of the model is frozen"):
        vitlr.compress(tiny_vit().requires_grad_(False), unread(), "params:60%", rungs="refit")


def test_compressed_says_what_was_decided_and_the_file_knows_it(tiny_vit, batches, tmp_path):
    model, seen = tiny_vit(), []
    done = compressed(model, batches, "params:70%", rank_step=4, width_step=8, decided=seen.append)
    assert seen == [done.plan] and done.report is None and done.images == done.statistics.images
    assert cost.count_params(done.model) == done.plan.params_kept
    vitlr.save(done.model, tmp_path / "small.safetensors")
    assert vitlr.load(tmp_path / "small.safetensors").vitlr_info["plan"] == done.plan.to_dict()
    twin = vitlr.compress(model, batches, "params:70%", rank_step=4, width_step=8)
    assert torch.equal(logits(twin, batches), logits(done.model, batches))
    only = compressed(model, batches, "params:70%", rank_step=4, width_step=8, plan_only=True)
    assert only.model is model and only.plan.to_dict() == done.plan.to_dict()


def test_options_come_as_values_or_as_keywords(tiny_vit, batches):
    model = tiny_vit()
    values = {
        "calibration": Calibration(objective="loss", samples=2),
        "planning": Planning(method="lowrank", rank_step=4),
        "recipe": Recipe(steps=3),
    }
    one = compressed(model, batches, "params:70%", **values)
    two = compressed(model, batches, "params:70%", objective="loss", samples=2, method="lowrank", rank_step=4, steps=3)
    assert one.plan.to_dict() == two.plan.to_dict() and one.statistics.samples == 2
    three = compressed(model, batches, "params:70%", **values, rank_step=8)  # a keyword changes the value
    assert all(rank % 8 == 0 for rank in three.plan.ranks.values())
    shown = inspect.signature(vitlr.compress).parameters
    assert {"method", "samples", "steps", "rounds", "stats"} <= set(shown) and shown["rank_step"].default == 16


def test_the_best_method_that_can_be_had_is_the_default(tiny_vit, batches):
    model = tiny_vit()
    assert compressed(model, batches, "params:60%", rank_step=4, width_step=8).plan.method == "joint"
    assert compressed(model, batches, "params:70%", rank_step=4, hidden_memory=1000).plan.method == "lowrank"
    assert compressed(model, batches, "params:70%", rank_step=4, uniform=True).plan.method == "lowrank"
    assert compressed(model, batches, "params:70%", rank_step=4, objective="normalized").plan.method == "lowrank"


def test_what_a_plan_is_asked_for_is_measured(tiny_vit, batches):
    model, seen = tiny_vit(), []

    def kept(plan):
        seen.append(plan)

    options = {"rank_step": 4, "width_step": 8, "decided": kept, "plan_only": True}
    done = compressed(model, batches, "params:60%", attention="channels", **options)
    assert done.statistics.extras == ("hidden", "values") and done.plan.attention == "channels"
    assert compressed(model, batches, "params:70%", objective=None, **options).plan.objective == "fisher"
    assert compressed(model, batches, "params:70%", method="lowrank", **options).statistics.extras == ()


def test_whoever_measures_himself_needs_no_loader(tiny_vit, batches):
    model, seen = tiny_vit(), []

    def measure(network):
        seen.append(network)
        return vitlr.calibrate(network, batches)

    done = compressed(model, None, "params:60%", rounds=2, rank_step=4, width_step=8, measure=measure)
    assert len(seen) == 2 and seen[0] is model and cost.count_params(done.model) == done.plan.params_kept
    twin = vitlr.compress(model, batches, "params:60%", rounds=2, rank_step=4, width_step=8)
    assert torch.equal(logits(twin, batches), logits(done.model, batches))


def test_compress_goes_on_from_a_file_of_statistics(tiny_vit, batches, tmp_path):
    model, file = tiny_vit(), tmp_path / "stats.safetensors"
    first = vitlr.compress(model, batches, "params:70%", rank_step=4, stats=file)
    again = vitlr.compress(model, None, "params:70%", rank_step=4, stats=file)
    assert torch.equal(logits(first, batches), logits(again, batches))
    with pytest.raises(InputError, match=r"objective=fisher, not loss"):
        vitlr.compress(model, batches, "params:70%", stats=file, objective="loss")
    with pytest.raises(InputError, match="need images"):
        vitlr.compress(model, None, "params:70%", stats=file, rungs="refit")
