"""Layers of 8-bit floats: near to the dense ones, whatever is done to the module, alone and in MLPs and blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitlr
from vitlr.errors import InputError
from vitlr.measuring.cost import count_params
from vitlr.nn import Fp8Block, Fp8Linear, Fp8MLP, FusedAttention, LowRankLinear
from vitlr.ops.layers.fp8_chain import FP8, OP, Step, reference, step_of
from vitlr.surgery.fusion import fuse, to_dense, unfuse

N, K = 40, 24


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(50, K)


@pytest.fixture
def dense():
    torch.manual_seed(1)
    return nn.Linear(K, N).requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(**more):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10, **more)
    nn.init.normal_(model.head.weight, std=0.2)
    return model.eval()


def off(ours, theirs):
    return (ours - theirs).norm() / theirs.norm()


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_near_to_the_dense_layer(x, dense, bias):
    dense.bias = dense.bias if bias else None
    layer = Fp8Linear.from_linear(dense)
    assert off(layer(x), dense(x)) < 0.05
    rounded = layer.to_linear()
    assert (rounded.bias is None) == (not bias)
    assert off(layer(x), rounded(x)) < 0.04 and off(rounded(x), dense(x)) < 0.04


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_stay_whatever_the_dtype(x, dense, dtype):
    layer = Fp8Linear.from_linear(dense)
    moved = copy.deepcopy(layer).to(dtype)
    for a, b in zip(moved.buffers(), layer.buffers(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert moved(x.to(dtype)).dtype == dtype and layer.weight.dtype == torch.float32
    assert off(moved(x.to(dtype)).float(), layer(x)) < 0.05
    assert copy.deepcopy(layer).to("meta").codes.is_meta


def test_nothing_is_cut_off_whatever_comes_in(dense):
    step, x = step_of(dense.weight, dense.bias), torch.randn(30, K)
    for act in ("none", "gelu", "gelu_tanh", "silu", "relu", "sigmoid"):
        for size in (1e-6, 1.0, 1e6)[: 2 if act == "sigmoid" else 3]:  # of a million it is a step
            second = Step(torch.eye(N).to(FP8), torch.ones(N), None, torch.tensor([1.0, 0.0]))
            columns = [list(part) for part in zip(step, second, strict=True)]
            y = reference(size * x, *columns, None, [act, "none"])
            exact = reference(size * x.double(), *columns, None, [act, "none"])
            assert ((y - exact).abs().amax() <= 0.2 * exact.abs().amax()).all(), (act, size)


def test_a_scale_goes_into_scales_and_signs(x, dense):
    layer, gamma = Fp8Linear.from_linear(dense), torch.randn(N)
    gamma[3] = 0
    y = layer(x)
    layer.multiply(gamma)
    torch.testing.assert_close(layer(x), gamma * y)
    torch.testing.assert_close(layer.reach, step_of(layer.to_linear().weight, layer.bias).reach, rtol=0.05, atol=0.0)


def test_there_is_no_gradient(x, dense):
    layer = Fp8Linear.from_linear(dense)
    with pytest.raises(InputError, match="fp8_chain has no gradient"):
        layer(x.requires_grad_()).sum().backward()


@torch.no_grad()
def test_a_whole_model_multiplies_8_bit_floats(images):
    model = vit()
    small = fuse(model, bits="fp8")
    assert all(type(block) is Fp8Block and type(block.mlp) is Fp8MLP for block in small.blocks)
    assert type(small.blocks[0].attn) is FusedAttention and type(small.head) is nn.Linear
    assert sum(isinstance(m, Fp8Linear) for m in small.modules()) == 8
    assert count_params(small) == count_params(model)
    assert off(small(images), model(images)) < 0.12
    assert not any(isinstance(m, Fp8Linear) for m in model.modules())  # a copy was taken


@torch.no_grad()
def test_fused_it_is_what_its_children_are(images):
    small = fuse(vit(init_values=0.5), bits="fp8")
    block, x = small.blocks[0], torch.randn(2, 17, 48)
    y, called = block(x), block._called(x, None, False)
    assert (y - called).norm() < 0.05 * (called - x).norm()
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    assert torch.equal(block(x, attn_mask=mask), block._called(x, mask, False))
    apart = unfuse(small)
    assert type(apart.blocks[0]).__name__ == "Block" and isinstance(apart.blocks[0].attn.qkv, Fp8Linear)
    assert off(apart(images), small(images)) < 0.1
    torch.testing.assert_close(torch.compile(small, backend="aot_eager")(images), small(images))


@torch.no_grad()
def test_low_rank_and_narrow_layers_are_taken_and_given_back(images):
    loader = images.split(8)
    for method in ({"uniform": True}, {"method": "joint"}):
        low = vitlr.compress(vit(), loader, "params:60%", objective="output", **method)
        small = fuse(low, bits="fp8")
        assert all(isinstance(block, Fp8Block) for block in small.blocks)
        lows = [m for m in small.modules() if isinstance(m, LowRankLinear)]
        assert all(isinstance(m.down, Fp8Linear) and isinstance(m.up, Fp8Linear) for m in lows)
        assert off(small(images), low(images)) < 0.2
        assert off(to_dense(small)(images), low(images)) < 0.2


def test_files_and_other_engines_hold_none(images, tmp_path):
    small = fuse(vit(), bits="fp8")
    with pytest.raises(InputError, match=r'save it before fuse\(bits="fp8"\)'):
        vitlr.save(small, tmp_path / "small.safetensors", model_args=False)
    with pytest.raises(InputError, match=r'export it before fuse\(bits="fp8"\)'):
        vitlr.export(small, tmp_path / "small.onnx")


@pytest.mark.parametrize("bits", [4, "int8", 8.5])
def test_other_bits_are_refused(bits):
    with pytest.raises(InputError, match="expected 8, 'fp8', or None"):
        fuse(vit(), bits=bits)
    with pytest.raises(InputError, match="go together"):
        fuse(vit(), bits=8)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"codes": torch.zeros(N, K)}, r"step 0: codes are torch.float32 \[40, 24\], expected torch.float8_e4m3fn"),
        ({"codes": torch.zeros(N, 3).to(FP8)}, r"codes are .*expected .* \[N, 24\]"),
        ({"scale": torch.ones(3)}, r"scale is torch.float32 \[3\], expected torch.float32 \[40\]"),
        ({"reach": torch.ones(3)}, r"reach is torch.float32 \[3\], expected torch.float32 \[2\]"),
        ({"bias": torch.ones(N).half()}, "bias is torch.float16"),
    ],
)
def test_parts_that_do_not_fit_are_refused(x, dense, change, told):
    step = step_of(dense.weight, dense.bias)._replace(**change)
    with pytest.raises(InputError, match=f"{OP}: .*{told}|{OP}: {told}"):
        torch.ops.vitlr.fp8_chain.default(
            x, [step.codes], [step.scale], [step.bias], [step.reach], None, ["none"], [], 0
        )
