"""`y = A (B x) + b` as an op: values, gradients, autocast, compilers, counters, errors."""

from __future__ import annotations

import pytest
import torch
from fake_kernels import fake_kernel
from tolerance import assert_close_to
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from vitlr.errors import InputError
from vitlr.ops.dispatch.ceilings import H200
from vitlr.ops.layers.activations import ACTIVATIONS
from vitlr.ops.layers.lowrank_linear import Key, lowrank_linear, reference, roofline

K, N, R = 24, 40, 6
OVERLOAD = torch.ops.vitlr.lowrank_linear.default


def factors(dtype=torch.float32, bias=True, K=K, N=N, R=R):
    torch.manual_seed(0)
    B, A, b = torch.randn(R, K) / K**0.5, torch.randn(N, R) / R**0.5, torch.randn(N)
    return B.to(dtype), A.to(dtype), b.to(dtype) if bias else None


def inputs():
    torch.manual_seed(1)
    return {
        "1d": torch.randn(K),
        "one row": torch.randn(1, K),
        "2d": torch.randn(63, K),
        "3d": torch.randn(2, 197, K),
        "4d": torch.randn(2, 3, 5, K),
        "channels first": torch.randn(2, K, 3, 5).permute(0, 2, 3, 1),
        "every second": torch.randn(7, 2 * K)[:, ::2],
        "expanded": torch.randn(1, K).expand(5, K),
        "no rows": torch.randn(0, K),
        "no images": torch.randn(0, 7, K),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", inputs())
def test_values(name, bias, dtype):
    x, (B, A, b) = inputs()[name].to(dtype), factors(dtype, bias)
    exact = x.double() @ (A.double() @ B.double()).mT + (b.double() if bias else 0)
    with fake_kernel("lowrank_linear") as calls:
        y = lowrank_linear(x, B, A, b)
    assert len(calls) == 1
    assert y.is_contiguous()
    assert_close_to(y, reference(x, B, A, b), exact)
    assert torch.equal(lowrank_linear(x, B, A, b), reference(x, B, A, b))


def leaves(dtype=torch.float64, bias=True, rows=(2, 3), needs=(True, True, True, True)):
    weights = factors(dtype, bias, K=4, N=5, R=2)  # seeds
    args = [torch.randn(*rows, 4, dtype=dtype), *weights]
    return [None if arg is None else arg.requires_grad_(need) for arg, need in zip(args, needs, strict=True)]


@pytest.mark.parametrize(
    "args",
    [leaves(torch.float32), leaves(torch.bfloat16, bias=False), (inputs()["channels first"], *factors())],
    ids=["float32", "bfloat16 without bias", "strided without gradients"],
)
def test_opcheck(args):
    torch.library.opcheck(OVERLOAD, (*args, None, "none"))


@pytest.mark.parametrize("needs", [(True,) * 4, *[tuple(i == j for j in range(4)) for i in range(4)]], ids=str)
def test_gradients_of_what_needs_them(needs):
    args = leaves(needs=needs)
    assert torch.autograd.gradcheck(lowrank_linear, args)
    lowrank_linear(*args).sum().backward()
    assert tuple(arg.grad is not None for arg in args) == needs


def test_gradients_without_bias_of_one_token_and_of_none():
    assert torch.autograd.gradcheck(lowrank_linear, leaves(bias=False))
    assert torch.autograd.gradcheck(lowrank_linear, leaves(rows=()))
    args = leaves(rows=(0,))
    lowrank_linear(*args).sum().backward()
    assert all(torch.equal(arg.grad, torch.zeros_like(arg)) for arg in args)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_and_residual(act):
    args = [*leaves(), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)]
    y = lowrank_linear(*args, act)
    x, B, A, b, residual = args
    assert torch.equal(y, ACTIVATIONS[act][0](reference(x, B, A, b)) + residual)
    assert torch.autograd.gradcheck(lambda *args: lowrank_linear(*args, act), args)
    torch.library.opcheck(OVERLOAD, (*args, act))


def test_second_derivatives():
    assert torch.autograd.gradgradcheck(lowrank_linear, leaves())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_good_as_torch(dtype):
    g = torch.randn(2, 3, 5, dtype=torch.float64)
    grads = []
    for function, kind in ((lowrank_linear, dtype), (reference, dtype), (reference, torch.float64)):
        args = [arg.detach().to(dtype).to(kind).requires_grad_() for arg in leaves()]
        grads.append(torch.autograd.grad(function(*args), args, g.to(dtype).to(kind)))
    for ours, plain, exact in zip(*grads, strict=True):
        assert_close_to(ours, plain, exact)


def test_frozen_factors_do_not_keep_the_input_alive():
    args = leaves(needs=(True, False, False, True))
    y = lowrank_linear(*args)
    kept = [tensor for tensor in y.grad_fn.saved_tensors if tensor is not None]
    assert sorted(tensor.shape for tensor in kept) == sorted(arg.shape for arg in args[1:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_the_same_eager_and_compiled(dtype):
    args = leaves(torch.float32)
    compiled = torch.compile(lowrank_linear, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=dtype):
        expected, eager, traced = reference(*args), lowrank_linear(*args), compiled(*args)
    assert expected.dtype == eager.dtype == traced.dtype == dtype
    assert torch.equal(eager, expected) and torch.equal(traced, expected)
    for y in (eager, traced):
        grads = torch.autograd.grad(y.sum(), args)
        for got, want in zip(grads, torch.autograd.grad(expected.sum(), args, retain_graph=True), strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_autocast_leaves_float64_alone():
    args = leaves(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lowrank_linear(*args).dtype == torch.float64


def test_compiled_once_for_any_number_of_rows():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lowrank_linear, fullgraph=True, dynamic=True, backend=counter)
    B, A, b = factors()
    for rows in (2, 5, 197, 3):
        x = torch.randn(rows, K)
        assert torch.equal(compiled(x, B, A, b), reference(x, B, A, b))
    assert counter.frame_count == 1


def test_flops_are_counted():
    x, (B, A, b) = torch.randn(2, 5, K), factors()
    with FlopCounterMode(display=False) as counter:
        lowrank_linear(x, B, A, b)
    assert counter.get_total_flops() == 2 * 10 * R * (K + N)


def test_roofline_of_a_vit_b_projection():
    floor = roofline(Key(12608, 768, 768, 128, dtype=torch.bfloat16), H200)
    assert floor.flops == 2 * 12608 * 128 * 1536
    assert floor.bytes == 2 * (12608 * 1536 + 128 * 1536)
    assert floor.floor_us == pytest.approx(9.1, abs=0.05)
    # Compute-bound where the rank exceeds the machine's FLOP per byte, and no floor without ceilings.
    wide = roofline(Key(12608, 768, 3072, 256, dtype=torch.bfloat16), H200)
    assert wide.floor_us == pytest.approx(1e6 * wide.flops / 790e12)
    assert roofline(Key(1, 2, 3, 1)).floor_us is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, B, A, b: (x[..., 1:], B, A, b), r"x \[4, 23\] and B \[6, 24\]"),
        (lambda x, B, A, b: (x, B[1:], A, b), r"A \[40, 6\] and B \[5, 24\]"),
        (lambda x, B, A, b: (x, B, A, b[1:]), r"bias \[39\] does not fit, expected \[40\]"),
        (lambda x, B, A, b: (x, B[0], A, b), r"B \[24\]"),
        (lambda x, B, A, b: (x.sum(), B, A, b), r"x \[\]"),
        (lambda x, B, A, b: (x, B, A.double(), b), "A is torch.float64 on cpu, x is torch.float32"),
        (lambda x, B, A, b: (x, B, A, b.to("meta")), "bias is torch.float32 on meta"),
        (lambda x, B, A, b: (x, B, A, b, b), r"residual \[40\] does not fit, expected \[4, 40\]"),
        (lambda x, B, A, b: (x, B, A, b, torch.zeros(4, N).half()), "residual is torch.float16 on cpu"),
        (lambda x, B, A, b: (x, B, A, b, None, "quick_gelu"), "unknown act 'quick_gelu', expected one of none, gelu"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    args = change(torch.randn(4, K), *factors())
    with pytest.raises(InputError, match=message):
        lowrank_linear(*args)


def test_what_does_not_fit_is_named_without_data():
    B, A, b = (factor.to("meta") for factor in factors())
    assert lowrank_linear(torch.empty(4, K, device="meta"), B, A, b).shape == (4, N)
    with pytest.raises(InputError, match="do not fit"):
        lowrank_linear(torch.empty(4, K + 1, device="meta"), B, A, b)
