"""FusedAttention: timm's attention with the op inside, taken where it is exact, refused elsewhere, given back whole."""

from __future__ import annotations

import copy

import pytest
import torch
from fake_kernels import fake_kernel
from timm.models.vision_transformer import Attention
from torch import nn

import vitlr
from vitlr.errors import InputError
from vitlr.nn import FusedAttention, LowRankLinear
from vitlr.surgery.fusion import fused_names

K, HEADS = 24, 3


def attention(low=True, **args):
    torch.manual_seed(0)
    module = Attention(K, HEADS, qkv_bias=True, **args)
    if low:
        module.qkv = LowRankLinear.from_linear(module.qkv, 5)
    return module.eval()


@pytest.fixture
def x():
    return torch.randn(2, 7, K)


@pytest.mark.parametrize("args", [{}, {"qk_norm": True, "norm_layer": nn.LayerNorm}, {"proj_drop": 0.3}], ids=str)
@pytest.mark.parametrize("low", [True, False])
def test_the_same_function_with_and_without_a_kernel(x, low, args):
    module = attention(low, **args)
    fused = FusedAttention(module)
    assert torch.equal(fused(x), module(x))
    with fake_kernel("attention") as calls:
        assert torch.equal(fused(x), module(x)) and len(calls) == 1
        assert calls[0][0].shape == (2, HEADS, 7, K // HEADS)


def test_masks_are_left_to_torch(x):
    module = attention()
    fused, mask = FusedAttention(module), torch.ones(7, 7, dtype=torch.bool).tril()
    with fake_kernel("attention") as calls:
        assert torch.equal(fused(x, attn_mask=mask), module(x, attn_mask=mask))
        assert torch.equal(fused(x, is_causal=True), module(x, is_causal=True))
        assert not calls


def test_a_norm_before_proj_is_applied(x):
    module = attention(scale_norm=True, norm_layer=nn.LayerNorm)
    with torch.no_grad():
        module.norm.weight.uniform_()
    with fake_kernel("attention") as calls:
        assert torch.equal(FusedAttention(module)(x), module(x)) and len(calls) == 1


def test_keys_stay_and_the_original_comes_back_with_the_weights_of_now(x):
    module = attention()
    module.note = "kept"
    fused = copy.deepcopy(FusedAttention(module))
    assert list(fused.state_dict()) == list(module.state_dict())
    with torch.no_grad():
        fused.proj.weight.mul_(2)
    back = fused.back()
    assert type(back) is Attention and back.note == "kept" and back.qkv is fused.qkv
    assert [name for name, _ in back.named_children()] == [name for name, _ in module.named_children()]
    assert torch.equal(back(x), fused(x)) and not torch.equal(back(x), module(x))
    fused = fused.to(torch.bfloat16).train()
    back = fused.back()
    assert all(child.training for child in back.modules()) and back.proj.weight.dtype == torch.bfloat16


class Other(Attention):
    """What a subclass does, nobody knows."""


REFUSED = {
    "it drops out attention": lambda: attention(attn_drop=0.1),
    "it is no timm.layers": lambda: Other(K, HEADS),
    "it has gate besides": lambda: attention(gated=True),
    "fused_attn is off": lambda: _set(attention(), "fused_attn", False),
    "it has hooks": lambda: _hooked(attention()),
    "it is one already": lambda: FusedAttention(attention()),
}


def _set(module, name, value):
    setattr(module, name, value)
    return module


def _hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_with_the_reason(reason):
    module = REFUSED[reason]()
    with pytest.raises(InputError, match=reason):
        FusedAttention(module)


def test_gradients_and_autocast(x):
    module = attention()
    fused = FusedAttention(copy.deepcopy(module))
    with fake_kernel("attention") as calls:
        got = torch.autograd.grad(fused(x).square().sum(), list(fused.parameters()))
        want = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(fused(x), module(x))
        assert len(calls) == 2


@pytest.mark.parametrize("kernel", [False, True])
def test_compiles_as_one_graph(kernel):
    fused = FusedAttention(attention())
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    with fake_kernel("attention", lambda key: None if kernel else "not now") as calls:
        for tokens in (3, 5, 17):
            x = torch.randn(2, tokens, K)
            torch.testing.assert_close(compiled(x), fused(x))
        assert len(calls) == 6 * kernel


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exported_scripted_and_traced_without_the_op(x):
    fused = FusedAttention(attention())
    with fake_kernel("attention") as calls:
        program = torch.export.export(fused, (x,))
        torch.testing.assert_close(program.module()(x), fused.back()(x))
        for module in (torch.jit.script(fused), torch.jit.trace(fused, x, check_trace=False)):
            torch.testing.assert_close(module(x), fused.back()(x))
        assert not calls


def test_of_a_model_saved_loaded_and_taken_back(tiny_vit, images, tmp_path):
    model = tiny_vit()
    fused = vitlr.fuse(model)
    assert fused_names(fused) == ["patch_embed.proj", *(f"blocks.{i}.attn" for i in range(len(model.blocks)))]
    with fake_kernel("attention") as calls:
        torch.testing.assert_close(fused(images), model(images))
        assert len(calls) == len(model.blocks)
    vitlr.save(fused, tmp_path / "m.safetensors", model_args=False)
    loaded = vitlr.load(tmp_path / "m.safetensors", model=copy.deepcopy(model))
    assert fused_names(loaded) == fused_names(fused) and torch.equal(loaded(images), fused(images))
    back = vitlr.unfuse(loaded)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(back(images), model(images))


class Foreign(torch.nn.Parameter):
    """A parameter as quantisers make them: of a class of its own."""


def test_weights_of_a_quantiser_are_left_alone_at_fusing_and_at_calling(tiny_vit, batches):
    import vitlr
    from vitlr.surgery.fusion import fused_names

    small = vitlr.compress(tiny_vit(), batches, "params:70%", rank_step=4, method="lowrank")
    fused = vitlr.fuse(small)
    assert fused_names(fused)
    for model in (small, fused):
        for module in [m for m in model.modules() if type(m) is torch.nn.Linear]:
            module.weight = Foreign(module.weight.detach().clone())
    again = vitlr.fuse(small)
    assert fused_names(again) == ["patch_embed.proj"] and torch.equal(again(batches[0][0]), small(batches[0][0]))
    attention = fused.blocks[0].attn
    assert isinstance(attention, FusedAttention) and "Foreign" in str(FusedAttention.why_not(small.blocks[0].attn))
    called = []
    attention._plain = lambda *args, plain=attention._plain: called.append(1) or plain(*args)
    fused(batches[0][0])
    assert called
