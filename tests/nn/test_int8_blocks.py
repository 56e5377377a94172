"""Int8Blocks: a sequence of blocks of bytes, looked at once a call; the same bits as its children one by one."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitlr
from vitlr.errors import InputError
from vitlr.nn import Int8Block, Int8Blocks
from vitlr.nn._standing import Standing
from vitlr.runtime.modules import swap
from vitlr.surgery.fusion import fuse, unfuse


@pytest.fixture(scope="module")
def images():
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit():
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10).eval()


@pytest.fixture(scope="module")
def small(images):
    model = vit()
    return fuse(model, bits=8, stats=vitlr.calibrate(model, images.split(8), extras=("ranges",)))


@pytest.fixture
def blocks(small):
    blocks = copy.deepcopy(small.blocks)
    assert isinstance(blocks, Int8Blocks) and all(type(block) is Int8Block for block in blocks)
    return blocks


@pytest.fixture
def x():
    return torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_together_give_what_they_give_one_by_one(blocks, x, dtype):
    blocks, x = blocks.to(dtype), x.to(dtype)
    expected, whole = blocks._called(x), x.clone()
    for _ in range(3):
        assert torch.equal(blocks(x), expected)
    assert torch.equal(x, whole)
    assert torch.equal(blocks(x[:1]), expected[:1]) and torch.equal(blocks(x), expected)
    assert torch.equal(blocks(x.transpose(0, 1).contiguous().transpose(0, 1)), expected)


@torch.no_grad()
def test_they_are_looked_at_once_a_call(blocks, x, monkeypatch):
    blocks(x)
    looked, holds = [], Standing.holds
    monkeypatch.setattr(Standing, "holds", lambda self, root: (looked.append(root), holds(self, root))[1])
    blocks(x)
    assert looked == [blocks]


@torch.no_grad()
@pytest.mark.parametrize("listen", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("child", ["0", "2", "1.attn", "1.attn.qkv", "2.mlp.fc2", "0.ls1"])
def test_who_listens_to_a_child_is_called(blocks, x, child, listen):
    whole, calls = blocks(x), []
    handle = getattr(blocks.get_submodule(child), listen)(lambda *_: calls.append(1))
    torch.testing.assert_close(blocks(x), whole, rtol=2e-2, atol=2e-2)
    assert calls == [1]
    handle.remove()
    assert torch.equal(blocks(x), whole)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda blocks: blocks[1].norm1.weight.mul_(2),
        lambda blocks: blocks[2].norm2.__setattr__("eps", 1.0),
        lambda blocks: blocks[0].attn.qkv.codes.neg_(),
        lambda blocks: blocks[2].mlp.fc2.bias.add_(3),
        lambda blocks: blocks[1].mlp.__setattr__("act", nn.ReLU()),
        lambda blocks: swap(blocks, "1.mlp.fc1", blocks[1].mlp.fc1.to_linear()),
        lambda blocks: blocks.pop(1),
        lambda blocks: blocks.append(copy.deepcopy(blocks[0])),
        lambda blocks: blocks.append(nn.Threshold(1.0, 0.0)),
        lambda blocks: blocks.__setitem__(1, nn.Identity()),
        lambda blocks: blocks[1].__setattr__("norm1", nn.LayerNorm(48, eps=1.0)),
    ],
    ids=["gamma", "eps", "codes", "bias", "activation", "float", "popped", "appended", "foreign", "replaced", "norm"],
)
def test_any_change_is_seen(blocks, x, change):
    before = [blocks(x) for _ in range(2)][-1]
    change(blocks)
    expected = nn.Sequential(*copy.deepcopy(list(blocks)))(x)
    assert torch.equal(blocks(x), expected) and not torch.equal(blocks(x), before)


@torch.no_grad()
def test_what_the_environment_asks_for_is_seen(blocks, x, monkeypatch):
    first = blocks(x)
    monkeypatch.setenv("VITLR_BACKEND", "torch")
    other = blocks(x)
    assert torch.equal(other, blocks._called(x)) and not torch.equal(other, first)
    monkeypatch.setenv("VITLR_BACKEND", "cpu")
    monkeypatch.setenv("VITLR_CPU_ISA", "portable")
    assert torch.equal(blocks(x), blocks._called(x))
    monkeypatch.undo()
    assert torch.equal(blocks(x), first)


def test_gradients_autocast_and_graphs_go_block_by_block(blocks, x):
    y = blocks(x.clone().requires_grad_())
    with pytest.raises(InputError, match="has no gradient"):
        y.sum().backward()
    with torch.no_grad():
        expected = blocks(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(blocks(x), blocks._called(x))
        torch.testing.assert_close(torch.compile(blocks, backend="aot_eager")(x), expected)
        assert copy.deepcopy(blocks).to("meta")(x.to("meta")).shape == x.shape


@torch.no_grad()
def test_another_dtype_in_one_block_is_refused_as_by_the_block(blocks, x):
    mixed = copy.deepcopy(blocks)
    mixed[1].norm1.bfloat16()
    with pytest.raises(RuntimeError):  # as the child itself does
        mixed(x)


@torch.no_grad()
def test_parts_of_the_sequence_are_plain_sequences(blocks, x):
    part = blocks[:2]
    assert type(part) is nn.Sequential and list(part) == [blocks[0], blocks[1]]
    assert torch.equal(blocks[-1](part(x)), blocks(x)) and len(blocks) == 3


@torch.no_grad()
def test_features_of_blocks_are_those_of_the_blocks_apart(small, images):
    apart = unfuse(small)
    for expected, found in zip(
        apart.forward_intermediates(images, indices=[0, 2], intermediates_only=True),
        small.forward_intermediates(images, indices=[0, 2], intermediates_only=True),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    fewer = copy.deepcopy(small)
    fewer.prune_intermediate_layers([1])
    assert len(fewer.blocks) == 2 and fewer.forward_features(images).isfinite().all()


def test_pickled_freed_and_given_back(small, blocks, x, images, tmp_path):
    with torch.no_grad():
        whole = blocks(x)
        again = pickle.loads(pickle.dumps(blocks))
        assert torch.equal(again(x), whole)
        vitlr.save(small, tmp_path / "m.safetensors", model_args=False)
        loaded = vitlr.load(tmp_path / "m.safetensors", model=vit())
        assert isinstance(loaded.blocks, Int8Blocks) and torch.equal(loaded(images), small(images))
    seen = weakref.ref(again)
    del again
    gc.collect()
    assert seen() is None
    apart = unfuse(small)
    assert type(apart.blocks) is nn.Sequential and type(apart.blocks[0]).__name__ == "Block"
    assert list(apart.state_dict()) == list(small.state_dict()) and apart.blocks.training == small.blocks.training
    blocks.pop(0)
    assert list(blocks.back()) == list(blocks)


def test_what_cannot_become_one_says_why(small):
    with pytest.raises(InputError, match="it is one already"):
        Int8Blocks(small.blocks)
    for other in (nn.Sequential(nn.Identity(), small.blocks[0]), nn.Sequential(small.blocks[0]), nn.Sequential()):
        with pytest.raises(InputError, match="not two Int8Blocks or more"):
            Int8Blocks(other)
    with pytest.raises(InputError, match=r"ModuleList is not exactly nn\.Sequential"):
        Int8Blocks(nn.ModuleList(small.blocks))
    heard = nn.Sequential(*copy.deepcopy(list(small.blocks)))
    heard.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="hooks"):
        Int8Blocks(heard)


@torch.no_grad()
def test_a_float_block_in_between_leaves_a_plain_sequence(small):
    model = unfuse(small)
    swap(model, "blocks.1.mlp.fc2", model.blocks[1].mlp.fc2.to_linear())
    assert type(fuse(model).blocks) is nn.Sequential
