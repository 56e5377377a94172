"""A model that a file is loaded into is the one that was saved, to what its modules hold and what it answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitlr
from vitlr.errors import InputError


class Hand(nn.Module):
    """No registry knows it; its arguments change no shape."""

    def __init__(self, act=nn.GELU, heads=2, eps=1e-5, scale=1.0, trick=False):
        super().__init__()
        self.embed, self.norm, self.trick = nn.Conv2d(3, 32, 8, 8), nn.LayerNorm(32, eps), trick
        self.attention = nn.ModuleDict({"qkv": nn.Linear(32, 96), "out": nn.Linear(32, 32)})
        self.heads, self.mlp, self.head = (
            heads,
            nn.Sequential(nn.Linear(32, 64), act(), nn.Linear(64, 32)),
            nn.Linear(32, 5),
        )
        self.scale = lambda x: x * scale  # no plain value: only the answer tells

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        q, k, v = self.attention["qkv"](self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = x + self.attention["out"](nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(self.scale(x))).mean(1))


@pytest.fixture
def file(tmp_path, batches):
    torch.manual_seed(0)
    small = vitlr.compress(Hand(), batches, "params:80%", rank_step=4, method="lowrank")
    vitlr.save(small, tmp_path / "hand.safetensors")
    return small, tmp_path / "hand.safetensors"


def test_the_same_architecture_is_taken(file, batches):
    small, path = file
    assert torch.equal(vitlr.load(path, model=Hand())(batches[0][0]), small(batches[0][0]))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"act": nn.ReLU}, r"mlp\.1 is a ReLU, saved it was a GELU"),
        ({"act": lambda: nn.GELU("tanh")}, r"mlp\.1\.approximate is 'tanh', saved it was 'none'"),
        ({"heads": 4}, r"heads is 4, saved it was 2"),
        ({"eps": 1e-6}, r"norm\.eps is 1e-06, saved it was 1e-05"),
        ({"scale": 1.5}, r"on an image of noise its answer is off by"),
    ],
)
def test_another_architecture_of_the_same_shapes_is_refused(file, other, said):
    with pytest.raises(InputError, match=f"the model is not the one that was saved: .*{said}"):
        vitlr.load(file[1], model=Hand(**other))


def test_a_model_whose_copy_runs_the_original_is_refused(file):
    dense = Hand()
    dense.forward = lambda x, _f=dense.forward: _f(x)
    with pytest.raises(InputError, match="would run the original"):
        vitlr.load(file[1], model=dense)


def test_files_of_before_have_no_answer_and_are_read(tiny_vit, tmp_path, monkeypatch, batches):
    monkeypatch.setattr("vitlr.checkpoint.likeness.answer", lambda *args: None)
    small = vitlr.compress(tiny_vit(), batches, "params:80%", rank_step=4)
    vitlr.save(small, tmp_path / "old.safetensors")
    monkeypatch.undo()
    assert torch.equal(vitlr.load(tmp_path / "old.safetensors")(batches[0][0]), small(batches[0][0]))


def test_half_precision_answers_within_its_rounding(tiny_vit, tmp_path, batches):
    small = vitlr.compress(tiny_vit(), batches, "params:80%", rank_step=4).bfloat16()
    vitlr.save(small, tmp_path / "half.safetensors")
    assert vitlr.load(tmp_path / "half.safetensors").head.weight.dtype == torch.bfloat16
