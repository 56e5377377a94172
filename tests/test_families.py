"""Every supported family from end to end: measured, planned, compressed, fused, saved, loaded, dense again."""

import copy

import pytest
import torch
from families import MODELS, arguments, make

import vitlr
from vitlr.anatomy import linears
from vitlr.checkpoint.structure import structure
from vitlr.measuring import cost


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_compressed_saved_and_loaded(name, tmp_path):
    count = MODELS[name][1]
    model, x = make(name)
    model, x = model.float(), x.float()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        dense = model(x)

    stats = vitlr.calibrate(model, [x], objective=("loss", "normalized"))
    assert len(stats.layers) == count and linears.bypassed(model).keys() == linears.bypassed(make(name)[0]).keys()
    for objective in ("loss", "normalized"):
        plan = vitlr.plan(model, stats, "params:85%", objective=objective, rank_step=1)
        small = vitlr.apply(model, plan)
        assert cost.count_params(small) == plan.params_kept <= 0.85 * plan.params
        assert structure(small).keys() == plan.ranks.keys()
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
        assert torch.equal(vitlr.fuse(small, fold=False)(x), logits) and torch.equal(loaded(x), fused(x))
        torch.testing.assert_close(fused(x), logits, rtol=1e-4, atol=1e-4)  # norms folded: rounded once more
        torch.testing.assert_close(vitlr.to_dense(loaded)(x), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_full_ranks_reproduce_the_dense_model(name):
    model, x = make(name)
    stats = vitlr.calibrate(model, [x])
    ranks = {layer.name: layer.size for layer in stats.layers.values()}
    small = vitlr.apply(model, vitlr.plan(model, stats, ranks=ranks))
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-6, atol=1e-6)
