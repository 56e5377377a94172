"""1x1 convolutions as the linears that they are: measured, compressed, in a file, and convolutions again."""

import copy

import pytest
import torch
from torch import nn

import vitlr
from vitlr.anatomy import visibility
from vitlr.errors import InputError
from vitlr.nn import LowRankLinear, PointwiseConv

SMALL = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_classes": 5}


def convnext():
    """A ConvNeXt whose MLPs are convolutions, as timm's smallest are."""
    torch.manual_seed(0)
    model = vitlr.create_model("convnext_atto", **SMALL).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model


def images(count=40):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def answers(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_one_place_is_a_linear_of_channels(bias, layout):
    conv = nn.Conv2d(6, 5, 1, bias=bias).double()
    linear = PointwiseConv.from_dense(conv)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    torch.testing.assert_close(linear(x), conv(x))
    torch.testing.assert_close(linear(x[0]), conv(x[0]))
    (expected,) = torch.autograd.grad(conv(x).square().sum(), x)
    (grad,) = torch.autograd.grad(linear(x).square().sum(), x)
    torch.testing.assert_close(grad, expected)
    assert linear.to_dense() is conv
    with torch.no_grad():
        linear.linear.weight.zero_()
    assert not conv.weight.any()  # one and the same numbers
    twin = copy.deepcopy(linear).to_dense()
    assert twin is not conv and twin.weight.shape == conv.weight.shape
    torch.testing.assert_close(twin(x), conv(x))


@pytest.mark.parametrize(
    "options", [{"kernel_size": 3}, {"kernel_size": 1, "stride": 2}, {"kernel_size": 1, "groups": 2}, {"padding": 1}]
)
def test_what_reads_more_than_one_place_is_left_alone(options):
    conv = nn.Conv2d(4, 4, **{"kernel_size": 1, **options})
    with pytest.raises(InputError, match="more than one place, or not all of the channels"):
        PointwiseConv.from_dense(conv)
    model = nn.Sequential(conv)
    assert visibility.make_visible(model) == () and model[0] is conv


def test_all_pointwise_convolutions_are_measured_and_come_back():
    model, x = convnext(), images()
    modules, before = dict(model.named_modules()), answers(model, x)
    stats = vitlr.calibrate(model, x.split(8))
    assert set(stats.layers) == {f"stages.{i}.blocks.0.mlp.{fc}.linear" for i in range(4) for fc in ("fc1", "fc2")}
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in modules.items()}
    assert torch.equal(answers(model, x), before)


@pytest.mark.parametrize("budget", ["params:85%", "bytes:40%"])
def test_a_convnext_of_convolutions_gets_smaller_and_its_file_gives_the_same_bits(budget, tmp_path):
    model, x = convnext(), images()
    options = {"rank_step": 1, "method": "lowrank"} if "params" in budget else {}
    small = vitlr.compress(model, x.split(8), budget, **options)
    vitlr.save(small, tmp_path / "small.safetensors")
    loaded = vitlr.load(tmp_path / "small.safetensors")
    assert torch.equal(answers(loaded, x), answers(small, x))
    assert not torch.equal(answers(small, x), answers(model, x))
    dense = vitlr.to_dense(small)
    assert dense.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(answers(dense, x), answers(small, x), rtol=1e-3, atol=1e-3)


def test_only_convolutions_that_changed_are_linears_afterwards():
    model, x = convnext(), images()
    name = "stages.2.blocks.0.mlp.fc1.linear"
    small = vitlr.compress(model, x.split(8), ranks={name: 2})
    assert type(small.get_submodule(name)) is LowRankLinear
    assert [key for key, m in small.named_modules() if isinstance(m, PointwiseConv)] == [name.removesuffix(".linear")]
