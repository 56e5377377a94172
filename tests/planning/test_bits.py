"""Bits: a plan of levels under a budget of bytes, and the model that comes of it, in every way a model is used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vitlr
from vitlr.errors import InputError
from vitlr.measuring import cost
from vitlr.nn import QuantizedLinear
from vitlr.planning.plans import Plan

OVERHEAD = 64 * 2**10  # of a file: names and the plan


@pytest.fixture(scope="module")
def measured(tiny_vit):
    model = tiny_vit(embed_dim=48, num_heads=3).eval()
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    stats = vitlr.calibrate(model, images.split(20), objective="loss", extras=("rounding",), hidden=False)
    return model, images, stats


@pytest.fixture(scope="module")
def rounded(measured):
    model, images, stats = measured
    plan = vitlr.plan(model, stats, "bytes:15%", method="bits")
    return plan, vitlr.apply(model, plan), images[:6]


@torch.no_grad()
def kl(model: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    p, q = model(images).log_softmax(-1), other(images).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_file_takes_what_the_plan_says(measured, rounded, tmp_path):
    model, _, stats = measured
    plan, small, _ = rounded
    assert plan.bytes_kept <= 0.15 * plan.bytes and plan.params_kept == plan.params == cost.count_params(small)
    assert cost.count_bytes(small) == pytest.approx(plan.bytes_kept, rel=0.03)
    vitlr.save(small, tmp_path / "m", plan=plan)
    assert (tmp_path / "m").stat().st_size <= plan.bytes_kept + OVERHEAD
    assert set(plan.levels) == set(stats.layers) and all(layer.bits for layer in plan.layers)
    assert cost.measure(small, (3, 32, 32)).macs == cost.measure(model, (3, 32, 32)).macs


def test_more_bytes_mean_less_loss_predicted_and_measured(measured):
    model, images, stats = measured
    spectra, found = None, []
    for share in (10, 12, 15, 22):
        plan = vitlr.plan(model, stats, f"bytes:{share}%", method="bits", spectra=spectra)
        spectra = plan.spectra
        found.append((plan.error, kl(model, vitlr.apply(model, plan), images)))
    assert found == sorted(found, reverse=True)
    assert all(measured < 2 * predicted for predicted, measured in found)


def test_of_a_model_of_features_the_loss_is_one_minus_their_cosine(tiny_vit, tmp_path):
    model = tiny_vit(embed_dim=48, num_heads=3, num_classes=0).eval()
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    stats, found = vitlr.calibrate(model, [images], objective="loss", extras=("rounding",), hidden=False), []
    for share in (12, 15, 22):
        plan = vitlr.plan(model, stats, f"bytes:{share}%", method="bits")
        small = vitlr.apply(model, plan)
        with torch.no_grad():
            found.append((plan.error, 1 - float(torch.cosine_similarity(model(images), small(images)).mean())))
    assert found == sorted(found, reverse=True)
    assert all(0.1 * predicted < measured < 2.5 * predicted for predicted, measured in found), found
    vitlr.save(small, tmp_path / "m")
    assert torch.equal(vitlr.load(tmp_path / "m")(images), small(images))


def test_all_the_bytes_change_nothing(measured):
    model, images, stats = measured
    plan = vitlr.plan(model, stats, "bytes:100%", method="bits")
    assert (
        not plan.changes
        and plan.bytes_kept == plan.bytes
        and torch.equal(vitlr.apply(model, plan)(images), model(images))
    )


def test_layers_left_out_stay_as_they_are(measured):
    model, _, stats = measured
    plan = vitlr.plan(model, stats, "bytes:40%", method="bits", exclude="attn")
    small = vitlr.apply(model, plan)
    assert not any("attn" in name for name in plan.levels) and "left out" in str(plan)
    assert torch.equal(small.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_plans_are_kept_as_json_and_applied_with_the_statistics(measured, rounded):
    model, _, stats = measured
    plan, small, x = rounded
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json() and again.to_dict()["schema"] == 4
    assert torch.equal(vitlr.apply(model, again, stats)(x), small(x))
    assert "level" in str(plan) and "layers rounded" in str(plan)
    for key, value, words in (
        ("level", 1.5, "level 1.5"),
        ("level", 10**6, "level 1000000"),
        ("bits", "x", "'x' bits"),
    ):
        body = plan.to_dict()
        body["layers"][0][key] = value
        with pytest.raises(InputError, match=words):
            Plan.from_dict(body)


def test_files_give_the_same_logits(rounded, tmp_path):
    _, small, x = rounded
    vitlr.save(small, tmp_path / "m")
    loaded = vitlr.load(tmp_path / "m")
    assert torch.equal(loaded(x), small(x)) and cost.count_bytes(loaded) == cost.count_bytes(small)
    vitlr.save(loaded, tmp_path / "n")
    assert torch.equal(vitlr.load(tmp_path / "n")(x), small(x))


def test_models_of_integers_are_models(rounded):
    _, small, x = rounded
    expected = small(x)
    assert sum(isinstance(module, QuantizedLinear) for module in small.modules()) == 8
    dense = vitlr.to_dense(small)
    assert not any(isinstance(module, QuantizedLinear) for module in dense.modules())
    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    fused = vitlr.fuse(small)
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    exported = torch.export.export(small, (x,)).module()
    for other in (dense, twin, vitlr.unfuse(fused), compiled, exported):
        assert torch.equal(other(x), expected)
    torch.testing.assert_close(fused(x), expected)


def test_damaged_files_are_refused(rounded, tmp_path):
    _, small, _ = rounded
    vitlr.save(small, tmp_path / "m", model_args=False)
    from vitlr.checkpoint import files
    from vitlr.runtime.storage import load_tensors, save_tensors

    tensors, header = load_tensors(tmp_path / "m", kind="model", schema=files.SCHEMA)
    name = "blocks.0.attn.qkv"
    structure, wild = header["structure"], torch.full((144,), 2000, dtype=torch.int16)
    damages = (
        ({f"{name}.codes|codes": tensors[f"{name}.codes|codes"][:-9]}, {}, "packed codes"),
        ({f"{name}.row_exponent|near": None, f"{name}.row_exponent": wild}, {}, "row_exponent reaches"),
        ({f"{name}.row_exponent|near": None, f"{name}.row_exponent": wild.float()}, {}, "expected torch.int16"),
        ({f"{name}.codes|nonsense": torch.zeros(3)}, {}, "no form of it that is known|the file has none"),
        ({}, {name: {**structure[name], "quantized": 3}}, "quantized 3, expected"),
        ({}, {name: {**structure[name], "twice": 10**6}}, "twice is 1000000"),
        ({}, {name: {**structure[name], "in_features": 7}}, "expected .*the file says"),
    )
    dense = vitlr.to_dense(small)
    for changed, other, words in damages:
        body = {**header, "structure": {**structure, **other}}
        body = {key: value for key, value in body.items() if key not in ("digest", "kind", "schema")}
        held = {key: tensor for key, tensor in {**tensors, **changed}.items() if tensor is not None}
        save_tensors(
            tmp_path / "bad", held, {**body, "digest": files._digest(held, body)}, kind="model", schema=files.SCHEMA
        )
        with pytest.raises(InputError, match=words):
            vitlr.load(tmp_path / "bad", model=dense)


def test_what_does_not_go_together_is_refused(measured, batches):
    model, _, stats = measured
    for budget, options, words in (
        ("params:40%", {}, "changes bytes only"),
        ("macs:40%", {}, "changes bytes only"),
        (None, {}, "give a budget"),
        ("bytes:1%", {}, "cannot be reached"),
        ("bytes:20%", {"uniform": True}, "goes with method='lowrank' only"),
        ("bytes:20%", {"attention": "heads"}, "goes with a budget and method"),
        ("bytes:20%", {"objective": "normalized"}, "normalized"),
        ("bytes:20%", {"prune_rate": 0.3}, "prune_rate="),
    ):
        with pytest.raises(InputError, match=words):
            vitlr.plan(model, stats, budget, method="bits", **options)
    with pytest.raises(InputError, match="moves weights that method='bits' makes integers; take rungs='distil'"):
        vitlr.compress(model, batches, "bytes:20%", method="bits", rungs="refit")
    hooked = copy.deepcopy(model)
    hooked.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="has hooks"):
        vitlr.apply(hooked, vitlr.plan(hooked, stats, "bytes:20%", method="bits"))


def test_compress_measures_what_it_needs(measured):
    model, images, _ = measured
    small = vitlr.compress(model, [images], "bytes:15%", method="bits")
    assert sum(isinstance(module, QuantizedLinear) for module in small.modules()) == 8
    assert small.vitlr_info["plan"]["method"] == "bits" and kl(model, small, images) < 0.1
