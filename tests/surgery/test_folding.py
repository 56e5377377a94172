"""Norms and layer scales folded into low-rank factors: the same function, keys, files; and what is left alone."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked

import vitlr
from vitlr.anatomy import linears
from vitlr.nn import FoldedScale, LowRankGLU, LowRankLinear
from vitlr.surgery.folding import fold
from vitlr.surgery.fusion import fused_names


@pytest.fixture
def small(tiny_vit):
    """Two blocks with layer scale, everything low-rank but the second block's fc1."""
    model = tiny_vit("vit_small_patch14_dinov2", patch_size=8, init_values=0.3).double()
    for name in linears.targets(model):
        if name != "blocks.1.mlp.fc1":
            parent, _, child = name.rpartition(".")
            low = LowRankLinear.from_linear(model.get_submodule(name), 7)
            setattr(model.get_submodule(parent), child, low)
    return model.eval()


ALL = [
    "blocks.0.norm1",
    "blocks.0.norm2",
    "blocks.1.norm1",
    "blocks.0.ls1",
    "blocks.0.ls2",
    "blocks.1.ls1",
    "blocks.1.ls2",
]


@pytest.fixture
def x(images):
    return images.double()


def test_the_function_and_the_keys_stay(small, x):
    fused = vitlr.fuse(small)
    assert list(fused.state_dict()) == list(small.state_dict())
    torch.testing.assert_close(fused(x), small(x), rtol=1e-12, atol=1e-12)
    folded = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn", "ls1", "mlp", "ls2")]
    assert fused_names(fused) == ["patch_embed.proj", *folded]
    for name in ("norm1", "norm2"):
        norm = fused.blocks[0].get_submodule(name)
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)) and not norm.bias.any()
    assert not torch.equal(fused.blocks[0].attn.qkv.down.weight, small.blocks[0].attn.qkv.down.weight)
    assert not torch.equal(small.blocks[0].norm1.weight, torch.ones(32, dtype=torch.float64))  # a copy was folded


def test_named_and_done_once(small, x):
    model = vitlr.fuse(small, fold=False)
    assert fold(model) == ALL
    before = copy.deepcopy(model.state_dict())
    fold(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unfuse_gives_the_classes_back_and_keeps_the_function(small, x):
    back = vitlr.unfuse(vitlr.fuse(small))
    assert [type(module) for module in back.modules()] == [type(module) for module in small.modules()]
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in small.parameters()]
    torch.testing.assert_close(back(x), small(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vitlr.to_dense(vitlr.fuse(small))(x), small(x), rtol=1e-12, atol=1e-12)


def test_the_scale_follows_device_and_dtype(small):
    back = vitlr.unfuse(vitlr.fuse(small).to(torch.bfloat16))
    assert back.blocks[0].ls1.gamma.dtype == torch.bfloat16


def test_saved_and_loaded(small, x, tmp_path):
    fused = vitlr.fuse(small)
    vitlr.save(fused, tmp_path / "m.safetensors", model_args=False)
    dense = copy.deepcopy(vitlr.to_dense(small))
    loaded = vitlr.load(tmp_path / "m.safetensors", model=dense)
    assert fused_names(loaded) == fused_names(fused)
    assert torch.equal(loaded(x), fused(x))


def test_weights_of_an_unfolded_model_are_refused(small):
    with pytest.raises(RuntimeError, match=r"blocks.0.ls1.gamma is not all ones.*load into the unfused model"):
        vitlr.fuse(small).load_state_dict(small.state_dict())


def test_gradients_flow_as_before(small, x):
    fused = vitlr.fuse(small)
    for model in (small, fused):
        model(x).square().sum().backward()
    scale = small.blocks[0].ls1.gamma.detach()
    ours, theirs = (model.blocks[0].attn.proj.up.weight.grad for model in (fused, small))
    torch.testing.assert_close(ours * scale[:, None], theirs, rtol=1e-9, atol=1e-12)
    assert not isinstance(small.blocks[0].ls1, FoldedScale)


def _hooked(model):
    model.blocks[0].norm1.register_forward_hook(lambda *_: None)


def _shared(model):
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight


def _gated(model):
    model.blocks[0].attn.gate = torch.nn.Linear(32, 32)


def _without_bias(model):
    model.blocks[0].attn.qkv.up.bias = None


def _not_finite(model):
    model.blocks[0].norm1.weight.data[3] = float("inf")


@pytest.mark.parametrize("change", [_hooked, _shared, _gated, _without_bias, _not_finite])
def test_what_would_not_be_exact_is_left_alone(small, change):
    change(small)
    before = copy.deepcopy(small.blocks[0].attn.qkv.state_dict())
    folded = fold(small)
    assert "blocks.0.norm1" not in folded
    assert all(torch.equal(value, before[name]) for name, value in small.blocks[0].attn.qkv.state_dict().items())


GATED = {"packed": SwiGLUPacked, "gate last": GluMlp, "split": SwiGLU}


@pytest.fixture(params=GATED)
def gated(request, tiny_vit):
    """Two blocks with layer scale and gated MLPs, everything low-rank."""
    layer = partial(GATED[request.param], act_layer=torch.nn.SiLU)
    model = tiny_vit("vit_small_patch14_dinov2", patch_size=8, init_values=0.3, mlp_layer=layer).double()
    for name in linears.targets(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LowRankLinear.from_linear(model.get_submodule(name), 7))
    return model.eval()


def test_gated_mlps_are_folded_too(gated, x, tmp_path):
    fused = vitlr.fuse(gated)
    assert all(isinstance(block.mlp, LowRankGLU) for block in fused.blocks)
    torch.testing.assert_close(fused(x), gated(x), rtol=1e-12, atol=1e-12)
    for block in fused.blocks:
        assert torch.equal(block.norm2.weight, torch.ones_like(block.norm2.weight)) and not block.norm2.bias.any()
        assert isinstance(block.ls2, FoldedScale)
    vitlr.save(fused, tmp_path / "m.safetensors", model_args=False)
    loaded = vitlr.load(tmp_path / "m.safetensors", model=vitlr.to_dense(gated))
    assert fused_names(loaded) == fused_names(fused) and torch.equal(loaded(x), fused(x))
    back = vitlr.unfuse(fused)
    assert [type(module) for module in back.modules()] == [type(module) for module in gated.modules()]
    torch.testing.assert_close(back(x), gated(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("what", ["dense", "without bias", "hooked", "one for both"])
def test_a_norm_before_gate_and_value_is_folded_into_both_or_neither(tiny_vit, x, what):
    model = tiny_vit("vit_small_patch14_dinov2", patch_size=8, init_values=0.3, mlp_layer=SwiGLU).double()
    mlp = model.blocks[0].mlp
    for name in ("fc1_g", "fc1_x")[what == "dense" :]:
        setattr(mlp, name, LowRankLinear.from_linear(getattr(mlp, name), 7))
    if what == "without bias":
        mlp.fc1_x.up.bias = None
    elif what == "one for both":
        mlp.fc1_x = mlp.fc1_g
    fused = vitlr.fuse(model, fold=False)
    if what == "hooked":
        fused.blocks[0].mlp.fc1_g.register_forward_hook(lambda *_: None)
    before, expected = copy.deepcopy(fused.state_dict()), fused(x)
    assert "blocks.0.norm2" not in fold(fused)
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items() if "mlp" in name)
    torch.testing.assert_close(fused(x), expected, rtol=1e-12, atol=1e-12)
