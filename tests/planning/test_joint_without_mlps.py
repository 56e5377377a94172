"""method="joint" where no MLP can get narrower: ranks, queries and keys all the same, and one line that says so."""

from __future__ import annotations

import logging

import pytest
import torch
from families import make
from torch import nn

import vitlr
from vitlr.errors import InputError

BUDGET, STEPS = "params:57%", {"rank_step": 4, "width_step": 4}


def joint_and_ranks(model, batches):
    small = vitlr.compress(model, batches, BUDGET, method="joint", **STEPS)
    stats = vitlr.calibrate(model, batches)
    return small, stats, *(vitlr.plan(model, stats, BUDGET, method=method, **STEPS) for method in ("joint", "lowrank"))


def said(caplog):
    return [record.message for record in caplog.records if "no MLP gets narrower" in record.message]


def test_where_a_norm_lies_over_the_hidden_neurons_ranks_queries_and_keys_are_taken(caplog, tmp_path):
    model, _ = make("eva02_base_patch14_224")
    with torch.no_grad():  # half of every head's queries say next to nothing, whichever channels turn together
        for block in model.blocks:
            for part in block.attn.q_proj.parameters():
                part.unflatten(0, (2, 2, 8))[:, :, :4] *= 1e-4
    torch.manual_seed(1)
    batches = [torch.randn(8, 3, 28, 28, dtype=torch.float64) for _ in range(3)]
    with caplog.at_level(logging.WARNING):
        small, stats, joint, ranks = joint_and_ranks(model, batches)
    assert len(said(caplog)) == 2  # once a plan
    assert "blocks.0.mlp (SwiGLU) keeps its width: its norm is a LayerNorm" in said(caplog)[0]
    assert "upported" not in said(caplog)[0] and joint.why == said(caplog)[0]
    assert stats.extras == ("queries",)
    assert {row.kind for row in joint.widths} == {"query_keys"} and joint.error < ranks.error
    assert (
        sum(p.numel() for p in small.parameters())
        == joint.params_kept
        <= 0.57 * sum(p.numel() for p in model.parameters())
    )
    assert [block.mlp.fc2.in_features for block in small.blocks] == [b.mlp.fc2.in_features for b in model.blocks]
    by_itself = vitlr.plan(model, stats, BUDGET, **STEPS)
    assert by_itself.method == "joint" and by_itself.error == joint.error
    vitlr.save(small, tmp_path / "m.safetensors", model_args=False)
    loaded = vitlr.load(tmp_path / "m.safetensors", model=model)
    assert torch.equal(loaded(batches[0]), small(batches[0]))


class Chain(nn.Module):
    """Neither MLPs nor attentions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        y = self.a(x.flatten(2)).tanh()
        return self.head((self.b(y).cos() + y).mean(1))


def test_where_there_is_nothing_but_linears_the_plan_is_that_of_ranks(caplog):
    torch.manual_seed(0)
    model, batches = Chain().eval(), [torch.randn(8, 3, 4, 4) for _ in range(4)]
    with caplog.at_level(logging.WARNING):
        _, stats, joint, ranks = joint_and_ranks(model, batches)
    assert said(caplog)[0] == "no MLP gets narrower: Chain has no MLP of a form that is known"
    assert not joint.widths and joint.error == ranks.error > 0
    assert [(row.name, row.rank) for row in joint.layers] == [(row.name, row.rank) for row in ranks.layers]
    with pytest.raises(InputError, match="no MLP of a form that is known"):  # there is nothing else in such a plan
        vitlr.plan(model, stats, BUDGET, method="widths")


def test_mlps_that_were_not_measured_are_still_asked_for(tiny_vit, batches):
    model = tiny_vit()
    stats = vitlr.calibrate(model, batches, hidden=False)
    with pytest.raises(InputError, match=r"no hidden moments .* calibrate with hidden=True"):
        vitlr.plan(model, stats, BUDGET, method="joint")
