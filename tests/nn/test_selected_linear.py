"""SelectedLinear: the function with channels taken out, exactly, dense or low-rank, saved, exported and trained."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerance import assert_close_to
from torch import nn

from vitlr.errors import InputError
from vitlr.nn import LowRankLinear, SelectedLinear

K, N = 11, 7
INPUTS, OUTPUTS = [0, 2, 3, 7, 10], [1, 2, 6]
CHOICES = [(INPUTS, None), (None, OUTPUTS), (INPUTS, OUTPUTS)]


def masked(linear: nn.Module, x: torch.Tensor, inputs, outputs) -> torch.Tensor:
    """The specification: other inputs are zero, other outputs are."""
    column, row = torch.zeros(K, dtype=x.dtype), torch.zeros(N, dtype=x.dtype)
    column[slice(None) if inputs is None else inputs] = 1
    row[slice(None) if outputs is None else outputs] = 1
    return linear(x * column) * row


def layers() -> dict[str, nn.Module]:
    return {
        "dense": nn.Linear(K, N, dtype=torch.float64),
        "no bias": nn.Linear(K, N, bias=False, dtype=torch.float64),
        "low rank": LowRankLinear(K, N, 3, dtype=torch.float64),
        "a rank above what is left": LowRankLinear(K, N, 6, dtype=torch.float64),
    }


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize(("inputs", "outputs"), CHOICES)
def test_it_is_the_masked_layer(name, inputs, outputs):
    linear, x = layers()[name], torch.randn(2, 5, K, dtype=torch.float64)
    small = SelectedLinear.from_linear(linear, inputs, outputs)
    expected = masked(linear, x, inputs, outputs)
    assert torch.allclose(small(x), expected, rtol=0, atol=1e-13)
    assert torch.allclose(small.to_linear()(x), expected, rtol=0, atol=1e-13)
    k, n = len(inputs or range(K)), len(outputs or range(N))
    rank = getattr(linear, "rank", None)
    factors = rank * (k + n) if rank is not None and rank <= min(k, n) else k * n
    assert sum(p.numel() for p in small.parameters()) == factors + (0 if name == "no bias" else n)
    assert (small.in_features, small.out_features) == (K, N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_rounds_like_a_linear(dtype):
    linear, x = nn.Linear(64, 48), torch.randn(9, 64)
    inputs, outputs = torch.arange(0, 64, 2), torch.arange(5, 48, 3)
    small = SelectedLinear.from_linear(linear.to(dtype), inputs, outputs)
    exact = SelectedLinear.from_linear(copy.deepcopy(linear).double(), inputs, outputs)(x.to(dtype).double())
    assert_close_to(small(x.to(dtype)), small.to_linear()(x.to(dtype)), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert small.float()(x).dtype == torch.bfloat16


def test_gradients_are_those_of_the_masked_layer():
    linear = nn.Linear(K, N, dtype=torch.float64)
    small = SelectedLinear.from_linear(linear, INPUTS, OUTPUTS)
    x = torch.randn(4, K, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(small(x).square().sum(), (x, small.linear.weight, small.linear.bias))
    theirs = torch.autograd.grad(masked(linear, x, INPUTS, OUTPUTS).square().sum(), (x, linear.weight, linear.bias))
    assert torch.allclose(ours[0], theirs[0]) and torch.allclose(ours[1], theirs[1][OUTPUTS][:, INPUTS])
    assert torch.allclose(ours[2], theirs[2][OUTPUTS])


def test_the_original_keeps_its_weights_and_flags():
    linear = nn.Linear(K, N).requires_grad_(False).eval()
    before = linear.weight.clone()
    small = SelectedLinear.from_linear(linear, INPUTS, None)
    assert not small.training and not small.linear.training and not small.linear.weight.requires_grad
    small.linear.weight.data.zero_()
    assert torch.equal(linear.weight, before)


def test_state_keeps_the_channels():
    linear = nn.Linear(K, N)
    small = SelectedLinear.from_linear(linear, INPUTS, OUTPUTS)
    assert list(small.state_dict()) == ["inputs", "outputs", "linear.weight", "linear.bias"]
    other = SelectedLinear.from_linear(nn.Linear(K, N), [0, 1, 2, 3, 4], [0, 1, 2])
    other.load_state_dict(small.state_dict())
    x = torch.randn(3, K)
    assert torch.equal(other(x), small(x)) and torch.equal(copy.deepcopy(small)(x), small(x))
    assert small.half().inputs.dtype == torch.int64
    for bad in ([0, 1, 2, 3, 11], [4, 3, 2, 1, 0], [-1, 0, 1, 2, 3]):
        with pytest.raises(InputError, match="inputs: expected increasing channel numbers from 0 to 10"):
            other.load_state_dict({**small.float().state_dict(), "inputs": torch.tensor(bad)})


def test_it_compiles_and_exports():
    small, x = SelectedLinear.from_linear(nn.Linear(K, N), INPUTS, OUTPUTS).eval(), torch.randn(3, K)
    expected = small(x)
    assert torch.equal(torch.compile(small, fullgraph=True, backend="eager")(x), expected)
    assert torch.equal(torch.export.export(small, (x,)).module()(x), expected)


def test_onnx_runs_it(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small, x = SelectedLinear.from_linear(nn.Linear(K, N), INPUTS, OUTPUTS).eval(), torch.randn(3, K)
    path = tmp_path / "selected.onnx"
    torch.onnx.export(small, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(out), small(x), atol=1e-6)


def test_channels_that_do_not_fit_are_refused():
    linear = nn.Linear(K, N)
    for inputs in ([], [3, 3], [5, 2], [0, 11], [-1, 4], [0.5, 1.0], [[1, 2]]):
        with pytest.raises(InputError, match="inputs"):
            SelectedLinear.from_linear(linear, inputs)
    with pytest.raises(InputError, match="outputs: expected increasing channel numbers from 0 to 6"):
        SelectedLinear.from_linear(linear, None, [7])
    with pytest.raises(InputError, match="inputs: the linear has 11, expected 2"):
        SelectedLinear(linear, K, N, [0, 1])
    with pytest.raises(InputError, match="got GELU"):
        SelectedLinear.from_linear(nn.GELU(), [0])
