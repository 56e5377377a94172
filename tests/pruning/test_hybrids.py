"""The hybrid of arXiv 2203.13444: attention becomes low rank, feed-forward blocks lose channels, all is fine-tuned."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import vitlr
from vitlr.errors import InputError
from vitlr.measuring.cost import count_params
from vitlr.nn import LowRankLinear, SelectedLinear
from vitlr.pruning.gates import gates

hybrid = functools.partial(vitlr.hybrid, tile=1)


class Stop(Exception):
    pass


def attention_weights(model: nn.Module) -> int:
    return sum(p.numel() for block in model.blocks for n, p in block.attn.named_parameters() if n.endswith("weight"))


def test_attention_is_low_rank_and_feed_forward_blocks_are_pruned(tiny_vit, labelled, quick, tmp_path):
    model = tiny_vit()
    small = hybrid(model, labelled, budget="params:50%", share=0.5, rank_step=1, recipe=quick, l1=0.01)
    report = small.vitlr_hybrid
    for block in small.blocks:
        assert type(block.attn.qkv) is LowRankLinear and type(block.attn.proj) is LowRankLinear
        assert not any(isinstance(m, LowRankLinear) for m in block.mlp.modules())
        assert isinstance(block.mlp.fc1, SelectedLinear) and block.mlp.fc2.in_features < 128
    ranks = report.plan.ranks
    assert ranks["blocks.0.attn.qkv"] == ranks["blocks.1.attn.qkv"]  # uniform, as published
    assert 0.4 * attention_weights(model) < attention_weights(small) <= 0.5 * attention_weights(model)
    total = count_params(model)
    assert count_params(small) == report.pruning.cut.params_kept and 0.49 * total < count_params(small) <= 0.5 * total
    assert {row.kind for row in report.pruning.cut.rows} == {"fc1", "fc2"}
    vitlr.save(small, tmp_path / "small.safetensors", plan=report.plan, recipe={"hybrid": report.to_dict()})
    loaded = vitlr.load(tmp_path / "small.safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), small(images))
    assert "feed-forward" in str(report) and json.loads(json.dumps(report.to_dict()))["finetuning"] is None


def test_ranks_may_be_allocated_and_a_rate_given(tiny_vit, labelled, quick):
    small = hybrid(
        tiny_vit(), labelled, 0.2, share=0.4, uniform=False, rank_step=1, recipe=quick, finetune=False, kinds="fc2"
    )
    report = small.vitlr_hybrid
    assert len(set(report.plan.ranks.values())) > 2
    assert report.pruning.cut.rate == pytest.approx(0.2, abs=1 / 256) and report.pruning.finetuning is None
    assert [row.kind for row in report.pruning.cut.rows] == ["fc2"]


def test_low_rank_alone(tiny_vit, labelled, quick, tmp_path):
    model = tiny_vit()
    how = {"budget": "params:60%", "kinds": None, "rank_step": 1, "recipe": quick}
    small = hybrid(model, labelled, **how)
    report = small.vitlr_hybrid
    assert report.pruning is None and report.finetuning.kept == 2
    assert count_params(small) <= 0.6 * count_params(model)
    assert any(".mlp." in name for name in report.plan.ranks) and any(".attn." in name for name in report.plan.ranks)
    untrained = hybrid(model, labelled, **how, finetune=False)
    assert not torch.equal(untrained.blocks[0].attn.qkv.up.weight, small.blocks[0].attn.qkv.up.weight)

    def stop(step) -> None:
        if step.updates == 5:
            raise Stop

    with pytest.raises(Stop):
        hybrid(model, labelled, **how, resume=tmp_path / "run", callbacks=[stop])
    resumed = hybrid(model, labelled, **how, resume=tmp_path / "run")
    assert all(
        torch.equal(a, b) for a, b in zip(small.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("gated", [True, False])
def test_an_interrupted_run_goes_on_to_the_same_bits(gated, tiny_vit, labelled, quick, tmp_path):
    model, how = tiny_vit(), {"rate": 0.3, "rank_step": 1, "recipe": replace(quick, recovery_interval=1)}

    def stop(step) -> None:
        if bool(gates(step.model)) == gated and step.updates == 3:
            raise Stop

    whole = hybrid(model, labelled, **how)
    with pytest.raises(Stop):
        hybrid(model, labelled, **how, resume=tmp_path / "run", callbacks=[stop])
    resumed = hybrid(model, labelled, **how, resume=tmp_path / "run")
    first, second = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first) and first.keys() == second.keys()


def test_statistics_at_hand_are_used(tiny_vit, batches, labelled, quick, monkeypatch):
    model = tiny_vit()
    stats = vitlr.calibrate(model, batches)
    monkeypatch.setattr("vitlr.pruning.hybrids.calibrate", None)
    small = hybrid(model, labelled, 0.2, stats=stats, rank_step=1, recipe=quick, finetune=False)
    assert small.vitlr_hybrid.plan.fingerprint == stats.fingerprint


def test_bad_wishes_are_refused(tiny_vit, labelled, quick):
    for change, said in (
        ({"rate": 1.2}, "between 0 and 1"),
        ({"rate": None}, "either a rate"),
        ({"share": 0}, "share=0"),
        ({"share": 1.0}, r"share=1\.0"),
        ({"kinds": None}, "low rank alone needs a budget"),
        ({"kinds": "mlp"}, "unknown gates 'mlp'"),
        ({"rank_step": 32}, r"attention cannot keep share=0\.5 at rank_step=32: budget .* smaller rank step"),
    ):
        with pytest.raises(InputError, match=said):
            hybrid(tiny_vit(), labelled, **{"rate": 0.3, **change}, recipe=quick)
    with pytest.raises(InputError, match="has no attention to factorise"):
        hybrid(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), labelled, 0.3, recipe=quick)
