"""Attention widths in plans, models, files and refinement: what a plan says is what the model then is."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from families import MODELS, make

import vitlr
from vitlr.checkpoint import files
from vitlr.checkpoint.structure import restructure, structure
from vitlr.errors import InputError
from vitlr.measuring import cost
from vitlr.nn import LowRankLinear, SelectedLinear
from vitlr.planning.plans import SCHEMA, Plan
from vitlr.pruning import narrow_mlp, read_mlp

STEPS = {"rank_step": 4, "width_step": 8}


@pytest.fixture(scope="module")
def calibrated(tiny_vit):
    torch.manual_seed(0)
    model = tiny_vit(num_heads=4)
    with torch.no_grad():  # heads that are worth little: those of the first block nearly repeat each other
        for block in model.blocks:
            block.attn.proj.weight[:, :8] *= 0.05
    images = [torch.randn(16, 3, 32, 32) for _ in range(3)]
    return model, vitlr.calibrate(model, images, objective=("loss", "fisher"), hidden="attention")


def narrowed(plan: Plan) -> set[str]:
    return {row.name for row in plan.widths if row.kind != "mlp" and row.width < row.full_width}


@pytest.mark.parametrize("method", ["widths", "joint"])
@pytest.mark.parametrize("grain", ["query_keys", "channels", "heads"])
@pytest.mark.parametrize(
    ("budget", "objective"), [("params:60%", "loss"), ("macs:62%", "fisher"), ("bytes:60%", "loss")]
)
def test_a_plan_is_what_the_model_then_costs(calibrated, images, method, grain, budget, objective):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, budget, objective=objective, method=method, attention=grain, **STEPS)
    small = vitlr.apply(model, plan)
    measured = cost.measure(small, (3, 32, 32))
    assert (plan.params_kept, plan.macs_kept, plan.bytes_kept) == (measured.params, measured.macs, measured.bytes)
    quantity = budget.partition(":")[0]
    assert getattr(plan, f"{quantity}_kept") <= vitlr.parse_budget(budget).limit(getattr(plan, quantity))
    assert narrowed(plan) and plan.attention == grain
    plain = vitlr.plan(model, stats, budget, method=method, attention="none", spectra=plan.spectra, **STEPS)
    assert plain.attention is None and plan.error <= plain.error * (1 + 1e-9)
    read = Plan.from_json(plan.to_json())
    assert read == plan and torch.equal(vitlr.apply(model, read, stats)(images), small(images))


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "eva02_base_patch14_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize("grain", ["channels", "heads"])
def test_families_cost_what_their_plans_say(name, grain):
    model, _ = make(name)
    size = MODELS[name][0]["img_size"]
    stats = vitlr.calibrate(model, [torch.randn(6, 3, size, size, dtype=torch.float64)], hidden="attention")
    for budget in ("params:92%", "bytes:92%"):
        plan = vitlr.plan(model, stats, budget, method="joint", attention=grain, include="attn", rank_step=8)
        measured = cost.measure(vitlr.apply(model, plan), (3, size, size))
        assert (plan.params_kept, plan.macs_kept, plan.bytes_kept) == (measured.params, measured.macs, measured.bytes)


def test_nothing_compensated_is_channels_set_to_zero(calibrated, images):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:85%", method="widths", attention="channels", compensate=False, **STEPS)
    small = vitlr.apply(model, plan)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, width in plan.narrowed.items():
            second = zeroed.get_submodule(f"{name}.proj" if name.endswith("attn") else f"{name}.fc2")
            gone = torch.ones(second.in_features, dtype=torch.bool)
            gone[plan.spectra.widths[name].keep(width)] = False
            second.weight[:, gone] = 0
    assert narrowed(plan)
    assert torch.allclose(small(images), zeroed(images), atol=1e-5)


def test_ranks_and_widths_in_one_attention(calibrated, images):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:33%", method="joint", attention="channels", **STEPS)
    both = [row for row in plan.layers if "attn" in row.name and row.rank is not None and (row.kept_in or row.kept_out)]
    assert both
    small = vitlr.apply(model, plan)
    layers = {row.name: small.get_submodule(row.name) for row in both}
    assert any(isinstance(layer, SelectedLinear) for layer in layers.values())
    for row in both:  # where as much of every head is left, or whole heads go, nothing has to be put in its place
        layer = layers[row.name].linear if isinstance(layers[row.name], SelectedLinear) else layers[row.name]
        assert isinstance(layer, LowRankLinear)
        assert (layer.out_features, layer.in_features, layer.rank) == (*row.shape, row.rank)
    dense = vitlr.to_dense(small)
    assert not any(isinstance(module, (SelectedLinear, LowRankLinear)) for module in dense.modules())
    assert torch.allclose(dense(images), small(images), atol=1e-4)
    assert torch.allclose(vitlr.fuse(small)(images), small(images), atol=1e-4)


def test_files_know_them_in_a_fresh_process(calibrated, images, tmp_path):
    model, stats = calibrated
    for grain in ("query_keys", "channels", "heads"):
        plan = vitlr.plan(model, stats, "params:45%", method="joint", attention=grain, **STEPS)
        assert narrowed(plan)
        small = vitlr.apply(model, plan)
        assert torch.allclose(vitlr.to_dense(small)(images), small(images), atol=1e-4)
        for form, network in {"plain": small, "fused": vitlr.fuse(small, fold=False)}.items():
            path = tmp_path / f"{grain}_{form}.safetensors"
            files.save(network, path, plan=plan)
            loaded = files.load(path)
            assert structure(loaded) == structure(small)
            assert Plan.from_dict(loaded.vitlr_info["plan"]) == plan
            with torch.no_grad():
                torch.save((images, network(images)), path.with_suffix(".pt"))
    code = f"""
        import pathlib, torch
        from vitlr import checkpoint
        torch.set_num_threads({torch.get_num_threads()})
        for path in pathlib.Path({str(tmp_path)!r}).glob("*.safetensors"):
            x, y = torch.load(path.with_suffix(".pt"))
            with torch.no_grad():
                print(torch.equal(checkpoint.load(path)(x), y))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout.split() == ["True"] * 6, done.stderr


@pytest.mark.parametrize("heads", [0, 5, -1, 2.0, True, "2", None])
def test_heads_out_of_range_are_refused(calibrated, heads):
    model = copy.deepcopy(calibrated[0])
    with pytest.raises(InputError, match="expected 1 to 4"):
        restructure(model, {"blocks.0.attn": {"heads": heads}})
    for name in ("nothing", "blocks.0.mlp", "blocks.0"):
        with pytest.raises(InputError, match="no attention of this model"):
            restructure(model, {name: {"heads": 2}})
    assert not structure(model)


def test_rows_say_what_happens_and_plans_from_anywhere_are_checked(calibrated):
    model, stats = calibrated
    plan = vitlr.plan(model, stats, "params:60%", method="joint", attention="heads", **STEPS)
    assert "attentions narrowed" in str(plan) and "heads" in str(plan)
    for change in (
        lambda body: body["widths"][0].update(kind="neurons"),
        lambda body: body["widths"][0].update(width=10**9),
        lambda body: body.update(schema=SCHEMA + 1),
    ):
        body = json.loads(plan.to_json())
        change(body)
        with pytest.raises(InputError):
            Plan.from_dict(body)
    body = json.loads(plan.to_json())
    row = next(row for row in body["widths"] if row["name"] in narrowed(plan))
    row["width"] -= 1
    with pytest.raises(InputError, match="expected a multiple of its head dimension 8"):
        vitlr.apply(model, Plan.from_dict(body), stats)
    row.update(name="blocks.7.attn")
    with pytest.raises(InputError, match=r"no attention of width 32 at 'blocks\.7\.attn'"):
        vitlr.apply(model, Plan.from_dict(body), stats)
    plain = vitlr.plan(model, stats, "params:60%", method="joint", attention="none", **STEPS).to_dict()
    assert plain["schema"] == 2 and not any("kind" in row for row in plain["widths"])
    watched = copy.deepcopy(model)
    watched.get_submodule(f"{min(narrowed(plan))}.proj").register_forward_hook(lambda *a: None)
    with pytest.raises(InputError, match="has hooks"):
        vitlr.apply(watched, plan)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "joint", "attention": "all"}, "unknown attention 'all', expected one of query_keys, channels"),
        ({"method": "widths+ranks", "attention": "heads"}, r"not with method='widths\+ranks'"),
        ({"method": "lowrank", "attention": "heads"}, "not with method='lowrank'"),
    ],
)
def test_options_that_make_no_sense(calibrated, options, said):
    model, stats = calibrated
    with pytest.raises(InputError, match=said):
        vitlr.plan(model, stats, "params:60%", **options)
    with pytest.raises(InputError, match="prune_rate="):
        vitlr.plan(model, stats, method="widths", prune_rate=0.3, attention="channels")


QUICK = {"steps": 2, "every": 1, "batch_size": 8, "regrow_steps": 2, "amp": False}


@pytest.mark.parametrize("rungs", ["regrow", "distil"])
def test_compress_measures_what_it_needs_and_refines(tiny_vit, rungs):
    images = [torch.randn(40, 3, 32, 32)]
    small = vitlr.compress(
        tiny_vit(), images, "params:45%", method="joint", attention="channels", rungs=rungs, **QUICK, **STEPS
    )
    assert any(isinstance(module, SelectedLinear) for module in small.modules())
    assert small.vitlr_refinement.rungs[-1].name == rungs


@pytest.mark.parametrize("parallel", [True, False])
def test_refinement_leaves_out_layers_whose_outputs_the_dense_network_has_not(tiny_vit, parallel):
    model, images = tiny_vit(), [torch.randn(40, 3, 32, 32)]
    small = copy.deepcopy(model)
    for block in small.blocks:
        block.attn.qkv = SelectedLinear(LowRankLinear(32, 80, 4), 32, 96, outputs=torch.arange(80))
        narrow_mlp(read_mlp(block.mlp), torch.arange(64))
        block.mlp.fc1 = LowRankLinear.from_linear(block.mlp.fc1, 8)
        block.mlp.fc2 = LowRankLinear.from_linear(block.mlp.fc2, 8)
    small = vitlr.refine(small, model, images, rungs="regrow", parallel=parallel, **QUICK | {"steps": 14})
    refit, residual = small.vitlr_refinement.rungs
    assert refit.steps == 2 + 5 and "of 2 layers" in refit.note  # fc2 of both blocks, and all norms
    assert ("of 2 layers" in residual.note) != parallel  # in parallel its inputs would be the dense network's
