"""Int8Block: timm's block as two operations, where that is exact up to rounding; its children everywhere else."""

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
from vitlr.nn import Int8Block, LowRankLinear, SelectedLinear, int8_block
from vitlr.runtime.modules import swap
from vitlr.surgery.fusion import fuse, unfuse


@pytest.fixture(scope="module")
def images():
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(**more):
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10, **more
    ).eval()


def small_of(model, images):
    return fuse(model, bits=8, stats=vitlr.calibrate(model, images.split(8), extras=("ranges",)))


@pytest.fixture(scope="module")
def small(images):
    return small_of(vit(), images)


@pytest.fixture
def block(small):
    block = copy.deepcopy(small.blocks[0])
    assert isinstance(block, Int8Block)
    return block


@pytest.fixture
def x():
    return torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(1))


def ops_called(call):
    """The operations of this package that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = call()
    return y, sorted(e.key.partition("::")[2] for e in profile.key_averages() if e.key.startswith("vitlr::"))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_operations_give_what_its_children_give(block, x, dtype):
    block, x = block.to(dtype), x.to(dtype)
    y, names = ops_called(lambda: block(x))
    assert names == ["int8_attention", "int8_chain"]
    called = block._called(x, None, False)
    last_bits = torch.finfo(dtype).eps * x.norm()  # of the residual sums
    assert (y - called).norm() < 0.02 * (called - x).norm() + last_bits and y.dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize(
    "child", ["norm1", "attn", "attn.qkv", "attn.q_norm", "ls1", "drop_path2", "mlp", "mlp.fc2", "mlp.act"]
)
def test_who_listens_to_a_child_is_called(block, x, child):
    calls, whole = [], block(x)
    handle = block.get_submodule(child).register_forward_hook(lambda *_: calls.append(1))
    assert (block(x) - whole).norm() < 0.02 * (whole - x).norm() and calls
    handle.remove()
    assert torch.equal(block(x), whole)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.norm1.weight.mul_(2),
        lambda block: block.norm2.__setattr__("eps", 1.0),
        lambda block: block.attn.qkv.codes.neg_(),
        lambda block: block.mlp.fc2.bias.add_(3),
        lambda block: block.mlp.__setattr__("act", nn.ReLU()),
        lambda block: swap(block, "mlp.fc1", block.mlp.fc1.to_linear()),
        lambda block: block.ls1.__class__ is nn.Identity and block.__setattr__("ls1", nn.Threshold(1.0, 0.0)),
    ],
    ids=["gamma", "eps", "codes", "bias", "activation", "a linear of floats", "a layer scale"],
)
def test_what_a_call_remembers_of_the_last_one_goes_with_any_change(block, x, change):
    before = [block(x) for _ in range(3)][-1]
    change(block)
    fresh = copy.deepcopy(block)
    assert torch.equal(block(x), fresh(x)) and not torch.equal(block(x), before)


@torch.no_grad()
def test_remembered_or_not_a_call_gives_the_same(block, x, monkeypatch):
    first, again = block(x), block(x)
    assert torch.equal(first, again)
    assert torch.equal(block(x[:1]), first[:1]) and torch.equal(block(x), first)  # of another shape, and back
    monkeypatch.setenv("VITLR_BACKEND", "torch")
    assert (block(x) - first).norm() < 0.02 * (first - x).norm() and not torch.equal(block(x), first)
    monkeypatch.setenv("VITLR_BACKEND", "cpu")
    monkeypatch.setenv("VITLR_CPU_ISA", "portable")
    torch.testing.assert_close(block(x), first, rtol=1e-3, atol=1e-2)


def test_a_block_that_was_called_is_pickled_and_freed(block, x):
    with torch.no_grad():
        whole = [block(x) for _ in range(2)][-1]
        again = pickle.loads(pickle.dumps(block))
        assert torch.equal(again(x), whole)
    seen = weakref.ref(again)
    del again
    gc.collect()
    assert seen() is None


@torch.no_grad()
def test_masks_autocast_and_other_dtypes_run_the_children(block, x):
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    assert torch.equal(block(x, attn_mask=mask), block._called(x, mask, False))
    assert torch.equal(block(x, is_causal=True), block._called(x, None, True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block(x), block._called(x, None, False))
    mixed = copy.deepcopy(block)
    mixed.norm1.bfloat16()
    with pytest.raises(RuntimeError):  # as the children's own norm does
        mixed(x)


@torch.no_grad()
def test_compiled_it_is_the_same(small, images):
    torch.testing.assert_close(torch.compile(small, backend="aot_eager")(images), small(images))


@torch.no_grad()
def test_given_back_whole(small, images):
    assert fuse(small).blocks[0] is not small.blocks[0]
    apart = unfuse(small)
    assert type(apart.blocks[0]).__name__ == "Block" and list(apart.state_dict()) == list(small.state_dict())
    torch.testing.assert_close(apart(images), small(images), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_a_linear_of_floats_leaves_the_block_to_its_children(small, x):
    model = unfuse(small)
    swap(model, "blocks.0.mlp.fc2", model.blocks[0].mlp.fc2.to_linear())
    again = fuse(model)
    assert not isinstance(again.blocks[0], Int8Block) and isinstance(again.blocks[1], Int8Block)


def test_what_cannot_become_one_says_why(small):
    apart = unfuse(small).blocks[0]
    with pytest.raises(InputError, match="its attention is no FusedAttention, or its MLP no Int8MLP"):
        Int8Block(apart)
    with pytest.raises(InputError, match=r"it is no timm\.models\.vision_transformer\.Block"):
        Int8Block(nn.Linear(3, 3))
    with pytest.raises(InputError, match="it is one already"):
        Int8Block(small.blocks[0])


@torch.no_grad()
def test_layer_scales_go_into_steps_and_signs_of_codes(images, tmp_path):
    model = vit(init_values=0.5)
    for block in model.blocks:
        for scale in (block.ls1, block.ls2):
            scale.gamma[::2] *= -1
        block.ls1.gamma[3] = 0
    stats = vitlr.calibrate(model, images.split(8), extras=("ranges",))
    apart, small = fuse(model, bits=8, stats=stats, fold=False), fuse(model, bits=8, stats=stats)
    assert all(isinstance(block, Int8Block) for block in small.blocks)
    assert not any(isinstance(block, Int8Block) for block in apart.blocks)
    torch.testing.assert_close(small(images), apart(images), rtol=1e-4, atol=1e-4)
    vitlr.save(small, tmp_path / "m.safetensors", model_args=False)
    assert torch.equal(vitlr.load(tmp_path / "m.safetensors", model=model)(images), small(images))
    torch.testing.assert_close(unfuse(small)(images), apart(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_linear_of_two_blocks_keeps_its_steps(images):
    model = vit(init_values=0.5)
    small = fuse(model, bits=8, stats=vitlr.calibrate(model, images.split(8), extras=("ranges",)), fold=False)
    unfuse(small, inplace=True)
    small.blocks[1].attn.proj = small.blocks[0].attn.proj
    y = small(images)
    torch.testing.assert_close(fuse(small)(images), y, rtol=1e-4, atol=1e-4)
    assert type(fuse(small).blocks[0].ls1) is type(small.blocks[0].ls1)


LEFT = ((5, 16, 1), (5, 16, 1))  # channels of queries and of keys in three heads of 16


def narrow_of(images, left=LEFT, values=48, rank=None):
    """A model whose queries and keys have lost channels, multiplying bytes, in factors of a rank if one is given."""
    model = vit()
    for block in model.blocks:
        parts = [48 * part + 16 * h + torch.arange(width) for part in (0, 1) for h, width in enumerate(left[part])]
        rows = torch.cat([*parts, 96 + torch.arange(values)])
        qkv = block.attn.qkv if rank is None else LowRankLinear.from_linear(block.attn.qkv, rank)
        block.attn.qkv = SelectedLinear.from_linear(qkv, outputs=rows)
    return small_of(model, images)


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_of_queries_and_keys_that_are_gone_are_left_out(images, x, dtype, rank):
    block, x = narrow_of(images, rank=rank).blocks[0].to(dtype), x.to(dtype)
    assert isinstance(block, Int8Block)
    y, names = ops_called(lambda: block(x))
    assert names == ["int8_attention", "int8_chain"]
    called = block._called(x, None, False)
    assert (y - called).norm() < 0.02 * (called - x).norm() + torch.finfo(dtype).eps * x.norm()
    first = [block(x) for _ in range(2)][-1]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert (compiled(x) - called).norm() < 0.02 * (called - x).norm() + torch.finfo(dtype).eps * x.norm()
    assert copy.deepcopy(block).to("meta")(x.to("meta")).shape == y.shape
    block.attn.qkv.outputs[:5] = block.attn.qkv.outputs[:5] + 11  # of the first head: no longer those of its keys
    assert not torch.equal(block(x), first) and torch.equal(block(x), block._called(x, None, False))


@torch.no_grad()
@pytest.mark.parametrize(
    ("left", "values"),
    [(((5, 16, 1), (4, 16, 2)), 48), (((5, 16, 1), (5, 16, 0)), 48), (((5, 16, 0), (5, 16, 0)), 48), (LEFT, 47)],
    ids=["other keys", "fewer keys", "a head without any", "a value gone"],
)
def test_other_channels_that_are_gone_leave_it_to_the_children(images, x, left, values):
    block = narrow_of(images, left, values).blocks[0]
    assert isinstance(block, Int8Block) and torch.equal(block(x), block._called(x, None, False))


@torch.no_grad()
def test_channels_that_are_left_are_counted_once_wherever_the_block_runs(images, x, monkeypatch):
    """To read them from a GPU would have the CPU wait in every call."""
    seen, counted = [], int8_block._counted
    monkeypatch.setattr(int8_block, "_counted", lambda *args: (seen.append(1), counted(*args))[1])
    monkeypatch.setenv("VITLR_BACKEND", "torch")  # which has no short way, so that a block looks at its parts each time
    block = narrow_of(images).blocks[0]
    y = [block(x) for _ in range(3)]
    assert len(seen) == 1 and torch.equal(y[0], y[2])
    block.attn.qkv.outputs[:5] += 11
    assert torch.equal(block(x), block._called(x, None, False)) and len(seen) == 2


@torch.no_grad()
def test_narrow_queries_and_keys_are_saved_loaded_given_back_and_multiplied_out(images, tmp_path):
    small = narrow_of(images)
    y = small(images)
    vitlr.save(small, tmp_path / "m.safetensors", model_args=False)
    loaded = vitlr.load(tmp_path / "m.safetensors", model=vit())
    assert all(isinstance(block, Int8Block) for block in loaded.blocks) and torch.equal(loaded(images), y)
    apart, dense = unfuse(small), vitlr.to_dense(small)
    assert isinstance(apart.blocks[0].attn.qkv, SelectedLinear)
    for other in (apart, dense):
        assert (other(images) - y).norm() < 0.05 * y.norm()
