"""Every supported family from end to end: measured, planned, compressed, fused, saved, loaded, dense again."""

import copy

import pytest
import torch
from families import MODELS, arguments, make

import vitlr
from vitlr.anatomy import visibility
from vitlr.checkpoint.structure import structure
from vitlr.measuring import cost
from vitlr.nn import FusedBiasedAttention


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_compressed_saved_and_loaded(name, tmp_path):
    count = MODELS[name][1]
    model, x = make(name)
    model, x = model.float(), x.float()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        dense = model(x)

    stats = vitlr.calibrate(model, [x], objective=("loss", "normalized"))
    assert len(stats.layers) == count and visibility.bypassed(model).keys() == visibility.bypassed(make(name)[0]).keys()
    for objective, method in (("loss", None), ("loss", "lowrank"), ("normalized", None)):
        plan = vitlr.plan(model, stats, "params:85%", objective=objective, method=method, rank_step=1)
        small = vitlr.apply(model, plan)
        assert cost.count_params(small) == plan.params_kept <= 0.85 * plan.params
        assert plan.method != "lowrank" or structure(small).keys() == plan.ranks.keys()
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
        with torch.no_grad():
            logits = small(x)
        assert torch.isfinite(logits).all() and not torch.equal(logits, dense)

    whole = vitlr.apply(model, vitlr.plan(model, stats, "params:100%", rank_step=1))
    fused = vitlr.fuse(small)
    vitlr.save(fused, tmp_path / "m.safetensors", model_args=arguments(name)[0], plan=plan)
    loaded = vitlr.load(tmp_path / "m.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(whole(x), dense, rtol=1e-4, atol=1e-4)
        assert torch.equal(loaded(x), fused(x))
        unfolded = vitlr.fuse(small, fold=False)
        if any(isinstance(module, FusedBiasedAttention) for module in unfolded.modules()):
            torch.testing.assert_close(unfolded(x), logits, rtol=1e-5, atol=1e-5)  # a bias is added in another order
        else:
            assert torch.equal(unfolded(x), logits)
        torch.testing.assert_close(fused(x), logits, rtol=1e-4, atol=1e-4)  # norms folded: rounded once more
        torch.testing.assert_close(vitlr.to_dense(loaded)(x), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_rounded_saved_and_loaded(name, tmp_path):
    model, x = make(name)
    model, x = model.float(), x.float()
    stats = vitlr.calibrate(model, [x], objective="loss", extras=("rounding",), hidden=False)
    plan = vitlr.plan(model, stats, "bytes:26%", method="bits")
    small = vitlr.apply(model, plan)
    path = tmp_path / "m.safetensors"
    vitlr.save(small, path, model_args=arguments(name)[0], plan=plan)
    loaded = vitlr.load(path)
    with torch.no_grad():
        dense, logits = model(x), small(x)
        assert torch.equal(loaded(x), logits) and torch.equal(vitlr.to_dense(small)(x), logits)
    assert path.stat().st_size <= plan.bytes_kept + 64 * 2**10
    assert plan.levels and (logits - dense).norm() < 0.1 * dense.norm()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_full_ranks_reproduce_the_dense_model(name):
    model, x = make(name)
    stats = vitlr.calibrate(model, [x])
    ranks = {layer.name: layer.size for layer in stats.layers.values()}
    small = vitlr.apply(model, vitlr.plan(model, stats, ranks=ranks))
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-6, atol=1e-6)


def test_an_mlp_whose_numbers_fail_keeps_its_width_and_the_plan_or_a_warning_says_so(caplog):
    """The pooling sees one token an image, and two images say little of its hidden neurons."""
    model, x = make("vit_base_patch16_siglip_224")
    model, x = model.float(), x.float()
    stats = vitlr.calibrate(model, [x], objective="loss")
    plan = vitlr.plan(model, stats, "params:85%", rank_step=1)
    kept = "1 left as wide as they are (MLP attn_pool.mlp: the moment of the hidden neurons is not positive definite"
    assert plan.method == "joint" and kept in plan.why and kept in str(plan)
    assert plan.narrowed and "attn_pool.mlp" not in {row.name for row in plan.widths}
    read = vitlr.Plan.from_json(plan.to_json())
    with torch.no_grad():
        assert torch.equal(vitlr.apply(model, read, stats)(x), vitlr.apply(model, plan)(x))
    asked = vitlr.plan(model, stats, "params:85%", rank_step=1, method="joint")
    assert asked.to_dict()["layers"] == plan.to_dict()["layers"] and kept.split(" (")[0] in caplog.text
