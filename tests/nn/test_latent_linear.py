"""Latent weights: bit for bit the layer of integers that they stand for, with the gradient of the dense one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitlr.nn.latent_linear import LatentLinear, nearest
from vitlr.nn.quantized_linear import QuantizedLinear, step

N, K = 40, 24


@pytest.fixture
def layer() -> QuantizedLinear:
    torch.manual_seed(0)
    codes = (torch.randn(N, K) * 3).round().to(torch.int8)
    rows, columns = torch.randint(-60, -20, (N,)).short(), torch.randint(-9, 10, (K,)).short()
    return QuantizedLinear.from_codes(codes, rows, columns, torch.randn(N))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("amp", [True, False])
def test_it_answers_as_the_integers_do_before_and_after_they_learn(layer, bias, amp):
    layer.bias = layer.bias if bias else None
    latent, x = LatentLinear(layer), torch.randn(2, 5, K)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        assert torch.equal(latent(x), layer(x))
        with torch.no_grad():
            latent.latent += torch.randn(N, K)
        after = latent.quantized()
        assert torch.equal(latent(x), after(x)) and not torch.equal(after.codes, layer.codes)
    assert after.codes.dtype == torch.int8 and after.bias is latent.bias
    assert torch.equal(after.row_exponent, layer.row_exponent)
    assert torch.equal(after.column_exponent, layer.column_exponent)


def test_the_latent_weights_get_the_gradient_of_the_dense_ones_times_their_step(layer):
    latent, x = LatentLinear(layer), torch.randn(7, K)
    with torch.no_grad():
        latent.latent += torch.rand(N, K) - 0.5
    W = latent.quantized().dense_weight().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    F.linear(x, W, bias).square().sum().backward()
    latent(x).square().sum().backward()
    steps = step(layer.row_exponent, layer.column_exponent)
    torch.testing.assert_close(latent.latent.grad, W.grad * steps, rtol=1e-5, atol=0)
    torch.testing.assert_close(latent.bias.grad, bias.grad)


def test_codes_that_are_wrong_are_learnt_from_what_the_right_ones_answer(layer):
    wrong = torch.rand(N, K) < 0.05
    right = QuantizedLinear.from_codes(
        layer.codes + wrong.to(torch.int8), layer.row_exponent, layer.column_exponent, layer.bias
    )
    latent = LatentLinear(layer)
    optimizer = torch.optim.Adam([latent.latent], lr=0.02)
    for _ in range(200):
        x = torch.randn(64, K)
        size = right.dense_weight().square().mean(1).sqrt()  # every row counts alike
        ((latent(x) - right(x).detach()) / size).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(wrong.sum()) > 20 and int((latent.codes() != right.codes).sum()) <= 2


def test_codes_are_the_nearest_and_never_beyond_their_range():
    u = torch.tensor([[0.0, 0.49, 0.51, -0.51, 1.2, -1.2, 126.9, 300.0, -300.0]])
    assert nearest(u).tolist() == [[0, 0, 1, -1, 1, -1, 127, 127, -127]]
    assert nearest(u, 0.25).tolist() == [[0, 0, 0, 0, 1, -1, 127, 127, -127]]
    assert nearest(u, 0.75).tolist() == [[0, 0, 0, 0, 0, 0, 126, 127, -127]]
