"""Looking at a model leaves nothing on it."""

from __future__ import annotations

import copy

import torch
from torch import nn

import vitlr
from vitlr.anatomy.mlps import find_mlps


class Keeping(nn.Module):
    """An MLP that keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2, self.kept, self.seen = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), None, []

    def forward(self, x):
        x = self.act(self.fc1(x))
        self.kept, self.shape = x, x.shape
        self.seen.append(x)
        return self.fc2(x)


def test_tracing_leaves_nothing_on_a_module_that_keeps_activations(tiny_vit, batches):
    model = tiny_vit()
    for block in model.blocks:
        block.mlp = Keeping()
    assert list(find_mlps(model)) == ["blocks.0.mlp", "blocks.1.mlp"]
    for block in model.blocks:
        assert block.mlp.kept is None and block.mlp.seen == [] and not hasattr(block.mlp, "shape")
    copy.deepcopy(model)
    small = vitlr.compress(model, batches, "params:70%", rank_step=4)
    assert isinstance(model.blocks[0].mlp.kept, torch.Tensor)
    copy.deepcopy(small), copy.deepcopy(model)
