"""FusedPatches: a convolution of patches as a linear, wherever that is the same, and given back whole."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitlr
from vitlr.errors import InputError
from vitlr.nn import FusedPatches
from vitlr.surgery.fusion import fuse, fused_names, unfuse


def conv(channels=3, N=5, size=(8, 8), dtype=torch.bfloat16, **more):
    torch.manual_seed(0)
    return nn.Conv2d(channels, N, size, stride=size, **more).to(dtype).eval()


def vit(**more):
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=10, **more
    ).eval()


def products(call):
    """Which of torch's products a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = call()
    keys = {event.key for event in profile.key_averages()}
    return y, keys & {"aten::conv2d", "aten::linear"}


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("channels", "size", "image"),
    [(3, (8, 8), (16, 24)), (1, (9, 11), (27, 33)), (4, (16, 8), (35, 20)), (3, (32, 32), (32, 32))],
    ids=["whole", "odd", "a rest that no patch covers", "one patch"],
)
def test_the_same_numbers_by_a_linear(channels, size, image, bias):
    dense = conv(channels, size=size, bias=bias)
    x = torch.randn(2, channels, *image).bfloat16()
    for given in (x, x.contiguous(memory_format=torch.channels_last), x[:, :, :, ::1].expand(2, -1, -1, -1)):
        y, ran = products(lambda given=given: FusedPatches(dense)(given))
        expected = copy.deepcopy(dense).double()(x.double())
        assert ran == {"aten::linear"} and y.shape == expected.shape and y.dtype == torch.bfloat16
        assert (y - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_in_other_dtypes_it_is_the_convolution(dtype):
    dense, x = conv(dtype=dtype), torch.randn(2, 3, 16, 16, dtype=dtype)
    y, ran = products(lambda: FusedPatches(dense)(x))
    assert ran == {"aten::conv2d"} and torch.equal(y, dense(x))


def test_one_image_without_a_batch_autocast_and_images_that_do_not_fit_are_left_to_it():
    dense = conv()
    layer, x = FusedPatches(dense), torch.randn(3, 16, 16).bfloat16()
    assert torch.equal(layer(x), dense(x))
    for wrong in (x[None, :2], x[None, :, :7], x[None].float()):
        with pytest.raises(RuntimeError) as ours:
            layer(wrong)
        with pytest.raises(RuntimeError) as torchs:
            dense(wrong)
        assert str(ours.value) == str(torchs.value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.float()(x[None].float()), dense(x[None].float()))


def test_gradients_reach_the_parameters_that_it_shares():
    dense, x = conv(), torch.randn(2, 3, 16, 16).bfloat16()
    layer = FusedPatches(dense)
    assert layer.weight is dense.weight and layer.bias is dense.bias
    FusedPatches(dense)(x).square().sum().backward()
    ours, dense.weight.grad = dense.weight.grad, None
    dense(x).square().sum().backward()
    assert (ours - dense.weight.grad).norm() < 0.02 * ours.norm()


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.Linear(3, 3), "Linear is not exactly nn.Conv2d"),
        (nn.Conv2d(3, 4, 8, stride=4), "it reads patches that overlap, lie apart or are padded"),
        (nn.Conv2d(3, 4, 8, stride=8, padding=1), "it reads patches that overlap, lie apart or are padded"),
        (nn.Conv2d(4, 4, 8, stride=8, groups=2), "or not all of their channels"),
        (nn.Conv2d(3, 4, 8, stride=8, dilation=2), "it reads patches that overlap, lie apart or are padded"),
        (nn.Conv2d(3, 4, 4, stride=4), "its patches are less than 8 pixels wide"),
    ],
)
def test_what_cannot_become_one_says_why(module, match):
    with pytest.raises(InputError, match=match):
        FusedPatches(module)
    listened = conv()
    listened.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="it has hooks"):
        FusedPatches(listened)


@torch.no_grad()
def test_of_a_model_fused_copied_saved_loaded_compiled_exported_and_given_back(tmp_path):
    model, images = vit(in_chans=2), torch.randn(4, 2, 32, 32)
    fused = fuse(model)
    assert isinstance(fused.patch_embed.proj, FusedPatches) and "patch_embed.proj" in fused_names(fused)
    assert list(fused.state_dict()) == list(model.state_dict()) and torch.equal(fused(images), model(images))
    half, x = copy.deepcopy(fused).bfloat16(), images.bfloat16()
    y, expected = half(x), copy.deepcopy(model).bfloat16()(x)
    assert (y - expected).norm() < 0.03 * expected.norm()
    for twin in (copy.deepcopy(half), pickle.loads(pickle.dumps(half)), torch.compile(half, backend="eager")):
        assert torch.equal(twin(x), y)
    assert (torch.jit.trace(half, x, check_trace=False)(x) - expected).norm() < 0.03 * expected.norm()
    torch.testing.assert_close(torch.jit.script(half.patch_embed.proj)(x), model.patch_embed.proj.bfloat16()(x))
    vitlr.save(half, tmp_path / "m.safetensors", model_args=False)
    loaded = vitlr.load(tmp_path / "m.safetensors", model=vit(in_chans=2))
    assert fused_names(loaded) == fused_names(fused) and torch.equal(loaded(x), y)
    back, dense = unfuse(loaded), vitlr.to_dense(loaded)
    assert type(back.patch_embed.proj) is nn.Conv2d and type(dense.patch_embed.proj) is nn.Conv2d
    assert torch.equal(back.patch_embed.proj.weight, half.patch_embed.proj.weight) and not back.patch_embed.training
    assert torch.equal(back(x), expected)
    meta = copy.deepcopy(half).to("meta")
    assert meta(x.to("meta")).is_meta and all(p.is_meta for p in unfuse(meta).parameters())
