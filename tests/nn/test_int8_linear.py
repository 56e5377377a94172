"""The layer that multiplies bytes: as near to the dense layer as eight bits are, whatever is done to the module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vitlr.errors import InputError
from vitlr.nn import Int8Linear, Int8MLP, LowRankLinear

N, K = 40, 24


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(50, K) * torch.logspace(-2, 1, K) + torch.linspace(-5, 5, K)  # channels as ViTs have them


def of(linear: nn.Linear, x, times=None) -> Int8Linear:
    return Int8Linear.from_weight(linear.weight, linear.bias, x.amin(0), x.amax(0), x.mean(0), times)


@pytest.fixture
def dense(x):
    return nn.Linear(K, N).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_near_to_the_dense_layer(x, dense, bias):
    dense.bias = dense.bias if bias else None
    layer, y = of(dense, x), dense(x)
    assert (layer(x) - y).norm() < 0.01 * (y - y.mean(0)).norm()
    assert (layer(x) - y).mean(0).abs().max() < 0.3 * (layer(x) - y).std(0).max()  # nothing is lost on average


def test_its_dense_layer_does_the_same_to_what_the_bytes_stand_for(x, dense):
    layer = of(dense, x)
    q = (x * layer.multiplier + layer.shift).round().clamp(0, 255)
    torch.testing.assert_close(layer(x), layer.to_linear()((q - layer.shift) / layer.multiplier), rtol=1e-4, atol=1e-4)


def test_inputs_beyond_the_range_count_as_its_ends(x, dense):
    layer = of(dense, x)
    torch.testing.assert_close(layer(x.amax(0) + 100), layer(x.amax(0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_stay_whatever_the_dtype(x, dense, dtype):
    layer = of(dense, x)
    moved = copy.deepcopy(layer).to(dtype)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(moved.buffers(), layer.buffers(), strict=True))
    assert moved(x.to(dtype)).dtype == dtype
    assert (moved(x.to(dtype)) - layer(x)).norm() < 0.02 * layer(x).norm()
    assert copy.deepcopy(layer).to("meta").scale.is_meta


def test_a_state_is_loaded_with_its_dtypes_or_not_at_all(x, dense):
    layer, other = of(dense, x), Int8Linear(K, N)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with pytest.raises(InputError, match=r"scale is torch.float16, expected torch.float32"):
        other.load_state_dict({**layer.state_dict(), "scale": layer.scale.half()})


@pytest.fixture
def huge(x, dense):
    """Inputs of which two channels are now and then huge, and the layer that gives them several columns."""
    x = x.clone()
    x[::10, 5] += 800
    x[::10, 20] -= 300
    times = torch.ones(K, dtype=torch.int64)
    times[5], times[20] = 60, 20
    return x, of(dense, x, times)


def test_wide_channels_have_as_many_steps_as_their_columns_together(huge, dense):
    x, layer = huge
    assert layer.wide.tolist() == [5] * 59 + [20] * 19 and layer.codes.shape == (N, K + 78)
    plain = x[torch.arange(len(x)) % 10 > 0]  # all others suffer from the step of one
    one, several = ((f(plain) - dense(plain)).std(0).norm() for f in (of(dense, x), layer))
    assert several < 0.1 * one
    levels = x[:, 5] * layer.multiplier[5] + layer.shift[5]
    assert levels.max() > 15000 and levels.min() > -1


def test_a_wide_layer_means_what_its_dense_layer_does(huge):
    x, layer = huge
    layer.check("layer")
    top = 255 * torch.bincount(torch.cat([torch.arange(K), layer.wide]), minlength=K)
    q = torch.minimum((x * layer.multiplier[:K] + layer.shift[:K]).round().clamp_min(0), top)
    expected = layer.to_linear()((q - layer.shift[:K]) / layer.multiplier[:K])
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)


def test_a_state_says_how_many_columns_there_are(huge, dense, x):
    many, layer = huge
    other = of(dense, x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(many), layer(many))
    other.load_state_dict(of(dense, x).state_dict())
    assert other.wide is None and torch.equal(other(x), of(dense, x)(x))


@pytest.mark.parametrize(
    ("part", "wrong", "told"),
    [
        ("wide", lambda t: t.flip(0), "wide is no rising list of channels from 0 to 23"),
        ("wide", lambda t: t + K, "wide is no rising list"),
        ("shift", lambda t: t.index_fill(0, torch.tensor(K + 3), 1.0), "shift of its wide channels does not go on"),
        ("multiplier", lambda t: t.index_fill(0, torch.tensor(K + 3), 1.0), "multiplier of its wide channels differ"),
        ("codes", lambda t: t.index_fill(1, torch.tensor(K + 3), 1), "codes of its wide channels differ"),
        ("codes", lambda t: t[:, 1:], r"codes is torch.int8 \[40, 101\], expected torch.int8 \[40, 102\]"),
    ],
)
def test_columns_that_belong_to_nothing_are_refused(huge, part, wrong, told):
    _, layer = huge
    setattr(layer, part, wrong(getattr(layer, part)))
    with pytest.raises(InputError, match=told):
        layer.check("layer")


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_ranges_that_are_none_are_refused(x, dense, wrong):
    high = x.amax(0)
    high[3] = wrong
    with pytest.raises(InputError, match="ranges of inputs must be finite"):
        Int8Linear.from_weight(dense.weight, dense.bias, x.amin(0), high, x.mean(0))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(K, N), nn.GELU(), nn.Linear(N, K)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@pytest.fixture
def mlp(x):
    whole = Mlp().eval().requires_grad_(False)
    hidden = whole.act(whole.fc1(x))
    low = LowRankLinear.from_linear(whole.fc2, 8)
    z = low.down(hidden)
    low.down, low.up = of(low.down, hidden), of(low.up, z)
    whole.fc1, whole.fc2 = of(whole.fc1, x), low
    return whole


def test_an_mlp_is_one_chain_and_the_same_as_its_children(mlp, x):
    one = Int8MLP(mlp)
    torch.testing.assert_close(one(x), mlp(x), rtol=1e-3, atol=1e-3)
    assert one.state_dict().keys() == mlp.state_dict().keys()
    assert type(one.back()) is Mlp and torch.equal(one.back()(x), mlp(x))
    called = []
    one.fc2.up.register_forward_hook(lambda *_: called.append(1))
    one(x)
    assert called


def test_what_is_no_such_mlp_is_told(mlp):
    with pytest.raises(InputError, match="fc1 is a Linear"):
        Int8MLP(Mlp())
    mlp.act = nn.Softmax(-1)
    with pytest.raises(InputError, match="activation Softmax"):
        Int8MLP(mlp)
