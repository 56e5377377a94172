"""LowRankLinear: where its factors come from and what they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitlr.errors import InputError, NumericalError
from vitlr.nn import LowRankLinear

K, N, R = 24, 40, 6


def layer(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return LowRankLinear(K, N, R, bias=bias, dtype=dtype)


def test_from_linear_is_the_best_approximation_of_its_rank():
    torch.manual_seed(0)
    for k, n in ((K, N), (N, K), (K, K)):
        linear = nn.Linear(k, n, dtype=torch.float64)
        S = torch.linalg.svdvals(linear.weight)
        for rank in (1, 5, min(k, n)):
            low = LowRankLinear.from_linear(linear, rank)
            assert (low.in_features, low.out_features, low.rank) == (k, n, rank)
            A, B = low.up.weight, low.down.weight
            error = (linear.weight - A @ B).square().sum()
            torch.testing.assert_close(error, S[rank:].square().sum(), rtol=1e-9, atol=1e-20)
            torch.testing.assert_close(A.mT @ A, B @ B.mT)  # balanced
            torch.testing.assert_close(A.mT @ A, torch.diag(S[:rank]))
            assert torch.equal(low.up.bias, linear.bias)


def test_from_linear_keeps_dtype_mode_and_shares_nothing():
    linear = nn.Linear(K, N, bias=False, dtype=torch.bfloat16).eval()
    before = linear.weight.clone()
    low = LowRankLinear.from_linear(linear, R)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert low.up.bias is None
    assert not low.training and not low.up.training
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.zero_()
    assert torch.equal(linear.weight, before)


def test_from_factors_copies_and_casts():
    A, B, b = torch.randn(N, R, dtype=torch.float64), torch.randn(K, R, dtype=torch.float64).mT, torch.randn(N)
    low = LowRankLinear.from_factors(A, B, b, dtype=torch.float32)
    assert torch.equal(low.up.weight, A.float()) and torch.equal(low.down.weight, B.float())
    assert all(
        p.is_contiguous() and p.requires_grad and p.is_leaf and p.dtype == torch.float32 for p in low.parameters()
    )
    same = LowRankLinear.from_factors(A, B)
    assert same.up.weight.dtype == torch.float64 and same.up.bias is None
    assert same.up.weight.data_ptr() != A.data_ptr()
    assert LowRankLinear.from_factors(A, B, device="meta").up.weight.is_meta


def test_making_a_layer_from_factors_leaves_the_generator_alone():
    linear = nn.Linear(K, N)
    state = torch.get_rng_state()
    LowRankLinear.from_linear(linear, R).to_linear()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bias", [True, False])
def test_to_linear_is_the_same_function(bias):
    low, x = layer(bias, torch.float64).eval(), torch.randn(3, K, dtype=torch.float64)
    dense = low.to_linear()
    assert type(dense) is nn.Linear and not dense.training and dense.weight.shape == (N, K)
    torch.testing.assert_close(dense(x), low(x))
    again = LowRankLinear.from_linear(dense, R)
    torch.testing.assert_close(again(x), low(x))


def test_fresh_layers_have_the_variance_of_a_linear():
    torch.manual_seed(0)
    low, dense = LowRankLinear(256, 512, 64), nn.Linear(256, 512)
    W = low.up.weight @ low.down.weight
    assert W.var().item() == pytest.approx(dense.weight.var().item(), rel=0.1)
    assert low.up.bias.var().item() == pytest.approx(dense.bias.var().item(), rel=0.2)


@pytest.mark.parametrize("rank", [0, -1, 25])
def test_ranks_out_of_range(rank):
    with pytest.raises(InputError, match=r"1\.\.24"):
        LowRankLinear(K, N, rank)
    with pytest.raises(InputError, match=r"1\.\.24"):
        LowRankLinear.from_linear(nn.Linear(K, N), rank)


def test_what_does_not_fit_is_named():
    A, B = torch.randn(N, R), torch.randn(R, K)
    with pytest.raises(InputError, match=r"A \[40, 6\], B \[24, 6\]"):
        LowRankLinear.from_factors(A, B.mT)
    with pytest.raises(InputError, match=r"bias \[24\] does not fit"):
        LowRankLinear.from_factors(A, B, torch.randn(K))
    with pytest.raises(InputError, match="got Conv2d"):
        LowRankLinear.from_linear(nn.Conv2d(3, 4, 1), 1)
    broken = nn.Linear(K, N)
    broken.weight.data[3, 4] = float("nan")
    with pytest.raises(NumericalError, match="NaN or Inf"):
        LowRankLinear.from_linear(broken, 3)


def test_there_is_no_dense_weight():
    weight = layer().weight  # parents ask it for its dtype; whoever computes with it reads past the layer
    assert (weight.dtype, weight.device, weight.shape) == (torch.float32, torch.device("cpu"), (N, K))
    assert weight.size(0) == N and weight.dim() == 2 and weight.numel() == N * K and weight.is_floating_point()
    with pytest.raises(TypeError, match="must be Tensor, not Shadow"):
        torch.nn.functional.linear(torch.randn(1, K), weight)
    assert weight.data.dtype == weight.dtype  # asked for so as well
    for used in (lambda: weight.T, lambda: weight.data.mul_(2), lambda: weight.copy_(0)):
        with pytest.raises(AttributeError, match=r"stores no weight.*call the layer"):
            used()
