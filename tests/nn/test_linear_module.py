"""LowRankLinear as a module: values, gradients, autocast, dispatch, copies."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from fake_kernels import fake_kernel
from tolerance import assert_close_to

from vitlr.errors import InputError
from vitlr.nn import LowRankLinear
from vitlr.ops.layers.lowrank_linear import reference

K, N, R = 24, 40, 6


def layer(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return LowRankLinear(K, N, R, bias=bias, dtype=dtype)


def calls_children(module, x):
    """What a forward of the module calls: the names of the children, in order."""
    seen = []
    handles = [
        child.register_forward_hook(lambda *_, name=name: seen.append(name)) for name, child in module.named_children()
    ]
    module(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward(dtype, kernel):
    low = layer(dtype=dtype)
    A, B, b = low.up.weight, low.down.weight, low.up.bias
    with fake_kernel("lowrank_linear", lambda key: None if kernel else "not now") as calls:
        for rows in [(), (63,), (2, 17), (2, 3, 5), (0, 7)]:
            x = torch.randn(*rows, K).to(dtype)
            exact = x.double() @ (A.double() @ B.double()).mT + b.double()
            assert_close_to(low(x), reference(x, B, A, b), exact)
        assert len(calls) == (5 if kernel else 0)


def test_the_key_describes_the_call():
    keys = []
    with fake_kernel("lowrank_linear", lambda key: keys.append(key)):
        layer(bias=False)(torch.randn(2, 5, K))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer()(torch.randn(2, 5, K))
    # Asked once by the module and once by the op: the same question, answered from memory the second time.
    assert [tuple(key) for key in keys] == [
        (10, K, N, R, False, "none", False, torch.float32, torch.device("cpu")),
        (10, K, N, R, True, "none", False, torch.bfloat16, torch.device("cpu")),
    ]


def test_the_override_reaches_the_module(monkeypatch):
    low, x = layer(), torch.randn(2, K)
    with fake_kernel("lowrank_linear") as calls:
        monkeypatch.setenv("VITLR_BACKEND", "torch")
        assert calls_children(low, x) == ["down", "up"]
        low(x)
        assert not calls
    monkeypatch.setenv("VITLR_BACKEND", "cuda")
    with pytest.raises(InputError, match="VITLR_BACKEND=cuda"):
        low(x)


@pytest.mark.parametrize("kernel", [False, True])
def test_gradients_reach_the_factors(kernel):
    low, x = layer(dtype=torch.float64), torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    with fake_kernel("lowrank_linear", lambda key: None if kernel else "not now") as calls:
        low(x).square().sum().backward()
        assert len(calls) == kernel
    A, B, b = (p.detach().clone().requires_grad_() for p in (low.up.weight, low.down.weight, low.up.bias))
    z = x.detach().clone().requires_grad_()
    reference(z, B, A, b).square().sum().backward()
    for got, want in ((x, z), (low.up.weight, A), (low.down.weight, B), (low.up.bias, b)):
        torch.testing.assert_close(got.grad, want.grad)


@pytest.mark.parametrize("kernel", [False, True])
def test_autocast(kernel):
    low, x = layer(), torch.randn(3, K)
    with (
        fake_kernel("lowrank_linear", lambda key: None if kernel else "not now") as calls,
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        y = low(x)
        assert len(calls) == kernel
        assert torch.equal(y, low.up(low.down(x))) and y.dtype == torch.bfloat16


def test_copies_state_dicts_and_pickles():
    low, x = layer(), torch.randn(3, K)
    assert list(low.state_dict()) == ["down.weight", "up.weight", "up.bias"]
    twin = copy.deepcopy(low)
    other = LowRankLinear(K, N, R)
    other.load_state_dict(low.state_dict())
    buffer = io.BytesIO()
    torch.save(low, buffer)
    buffer.seek(0)
    for same in (twin, other, torch.load(buffer, weights_only=False)):
        assert torch.equal(same(x), low(x))
        with torch.no_grad():
            same.up.weight.zero_()
        assert not torch.equal(same(x), low(x))


def test_meta_and_dtype_moves():
    low = LowRankLinear(K, N, R, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in low.parameters())
    low = low.to_empty(device="cpu").float()
    low.reset_parameters()
    assert low(torch.randn(2, K)).dtype == torch.float32


def test_repr_says_the_sizes():
    assert "in_features=24, out_features=40, rank=6, bias=True" in repr(layer())
