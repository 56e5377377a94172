"""The layer whose bytes go by the range of every token: its formula, its nearness, codes taken as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from int8_steps import step
from tolerance import assert_close_to
from torch import nn

import vitlr
from vitlr.errors import InputError
from vitlr.nn import Int8Linear, QuantizedLinear, TokenInt8Linear
from vitlr.ops.backends import native
from vitlr.ops.layers.int8_token import int8_token, reference
from vitlr.surgery.fusion import fuse

N, K = 40, 24


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def unambiguous(M: int, layer, dtype: torch.dtype) -> torch.Tensor:
    """x [M, K] whose v lies near whole steps of its token's range, which differs from token to token by thousands."""
    q = torch.randint(0, 256, (M, K)).double() + 0.2 * (torch.rand(M, K) - 0.5)
    q[:, 0], q[:, 1] = 0, 255
    v = q * torch.logspace(-1, 2, M)[:, None].double() + 50 * torch.randn(M, 1)
    return ((v - layer.shift) / layer.multiplier).to(dtype)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("M", [1, 7, 63])
def test_it_is_its_formula(monkeypatch, backend, M):
    if backend == "cpu" and not native.available():
        pytest.skip(str(native.why_not()))
    monkeypatch.setenv("VITLR_BACKEND", backend)
    one = step(K, N)
    x = unambiguous(M, one, torch.float32)
    exact = reference(
        x.double(), one._replace(**{n: getattr(one, n).double() for n in ("scale", "bias", "multiplier", "shift")})
    )
    assert_close_to(int8_token(x, one), reference(x, one), exact)


def test_every_byte_stands_for_a_255th_of_its_tokens_range():
    one = step(K, N)
    x = torch.randn(9, K).double()
    v = x * one.multiplier + one.shift
    y = reference(x, one)
    for t in range(9):
        low, d = v[t].min(), (v[t].max() - v[t].min()) / 255
        meant = low + d * ((v[t] - low) / d).round()
        torch.testing.assert_close(y[t], one.scale * (one.codes.double() @ meant) + one.bias)


def test_what_is_beyond_a_seen_range_is_not_cut_off():
    linear = nn.Linear(K, N).requires_grad_(False)
    x = torch.randn(50, K)
    told = (linear.weight, linear.bias, x.amin(0), x.amax(0), x.mean(0))
    static, token = Int8Linear.from_weight(*told), TokenInt8Linear.from_weight(*told)
    assert isinstance(token, TokenInt8Linear)
    assert (token(x) - linear(x)).norm() < 0.02 * linear(x).norm()
    far = 20 * x
    assert (token(far) - linear(far)).norm() < 0.02 * linear(far).norm()
    assert (static(far) - linear(far)).norm() > 0.5 * linear(far).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_rounded_weights_are_taken_as_they_are(dtype):
    codes = torch.randint(-7, 8, (N, K)).to(torch.int8)
    rows, columns = torch.randint(-40, -20, (N,)).short(), torch.randint(-8, 8, (K,)).short()
    layer = QuantizedLinear.from_codes(codes, rows, columns, torch.randn(N))
    token = TokenInt8Linear.from_linear(layer)
    assert torch.equal(token.codes, codes)
    torch.testing.assert_close(token.to_linear().weight, layer.dense_weight(), rtol=1e-6, atol=0)
    x = torch.randn(30, K).to(dtype)
    assert token(x).dtype == dtype
    assert (token(x) - layer(x)).float().norm() < 0.02 * layer(x).float().norm()


def test_columns_of_two_bytes_are_rounded_once_more():
    codes = torch.randint(-127, 128, (N, K)).to(torch.int16)
    codes[:, 3] *= 200
    layer = QuantizedLinear.from_codes(codes, torch.full((N,), -60).short(), torch.zeros(K).short(), None)
    x = torch.randn(30, K)
    assert layer.twice is not None
    assert (TokenInt8Linear.from_linear(layer)(x) - layer(x)).norm() < 0.02 * layer(x).norm()


def test_tokens_all_alike_and_tokens_that_are_not_finite_stay_what_they_are():
    linear = nn.Linear(K, N).requires_grad_(False)
    token = TokenInt8Linear.from_linear(linear)
    x = torch.randn(4, K)
    x[0], x[1, 3], x[2, 5] = 1.5, torch.nan, torch.inf
    y = token(x)
    assert not y[1].isfinite().any() and not y[2].isfinite().any()
    torch.testing.assert_close(y[[0, 3]], linear(x[[0, 3]]), rtol=0.05, atol=0.05)


@pytest.fixture(scope="module")
def vit(tiny_vit):
    return tiny_vit(depth=2)


@pytest.fixture(scope="module")
def many():
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stats(vit, many):
    return vitlr.calibrate(vit, many.split(8), objective="output", hidden=False, extras=("ranges",))


@torch.no_grad()
@pytest.mark.parametrize("measured", [True, False])
def test_a_model_goes_by_tokens_and_its_file_too(vit, many, stats, measured, tmp_path):
    small = fuse(vit, bits=8, scales="token", stats=stats if measured else None)
    assert {n for n, m in small.named_modules() if isinstance(m, TokenInt8Linear)} == set(stats.layers)
    y = vit(many)
    assert (small(many) - y).norm() < 0.06 * (y - y.mean(0)).norm()
    vitlr.save(small, tmp_path / "small.safetensors", model_args=False)
    again = vitlr.load(tmp_path / "small.safetensors", model=copy.deepcopy(vit))
    assert torch.equal(again(many), small(many))


@torch.no_grad()
def test_ranges_of_tokens_and_seen_ranges_both_take_a_model_of_codes(vit, many, stats):
    rounded = copy.deepcopy(vit)
    for name in stats.layers:
        linear = rounded.get_submodule(name)
        codes = (linear.weight * 64).round().clamp(-127, 127).to(torch.int8)
        rows, columns = torch.full((len(codes),), -48).short(), torch.zeros(codes.shape[1]).short()
        vitlr.runtime.modules.swap(rounded, name, QuantizedLinear.from_codes(codes, rows, columns, linear.bias))
    y = rounded(many)
    token = fuse(rounded, bits=8, scales="token")
    for name in stats.layers:
        assert torch.equal(token.get_submodule(name).codes, rounded.get_submodule(name).codes)
    seen = vitlr.calibrate(vitlr.to_dense(rounded), many.split(8), hidden=False, extras=("ranges",))
    for small in (token, fuse(rounded, bits=8, stats=seen)):
        assert (small(many) - y).norm() < 0.06 * (y - y.mean(0)).norm()


def test_what_does_not_go_together_is_said(vit, stats, tmp_path):
    with pytest.raises(InputError, match="scales='row': expected 'static'"):
        fuse(vit, bits=8, scales="row", stats=stats)
    with pytest.raises(InputError, match="scales='token' goes with bits=8, not with bits=None"):
        fuse(vit, scales="token")
    with pytest.raises(InputError, match="bits=8 and stats= go together"):
        fuse(vit, bits=8)
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    with pytest.raises(InputError, match="ranges of tokens, which run here alone"):
        vitlr.export(fuse(vit, bits=8, scales="token"), tmp_path / "small.onnx")
