"""`y = A (B x) + R x + b` as an op: values, gradients, autocast, compilers, counters, errors."""

from __future__ import annotations

import pytest
import torch
from fake_kernels import fake_kernel
from tolerance import assert_close_to
from torch.utils.flop_counter import FlopCounterMode

from vitlr.errors import InputError
from vitlr.ops import explain
from vitlr.ops.dispatch.ceilings import H200
from vitlr.ops.layers.codes import FORMS, FP8, code_shape, dequantise, encode, groups, spread
from vitlr.ops.layers.lowrank_residual_linear import Key, lowrank_residual_linear, reference, roofline

K, N, R, GROUP = 24, 42, 6, 8
OP, OVERLOAD = "lowrank_residual_linear", torch.ops.vitlr.lowrank_residual_linear.default


def parts(form, dtype=torch.float32, K=K, N=N, R=R, group=GROUP, bias=True):
    torch.manual_seed(0)
    B, A, b = torch.randn(R, K) / K**0.5, torch.randn(N, R) / R**0.5, torch.randn(N)
    if form == "blockdiag":
        codes, scale = torch.randn(code_shape(form, N, K, group)).to(dtype), None
    else:
        scale = (torch.rand(N, groups(K, group), dtype=torch.float64) / 20 + 0.01).to(dtype)
        codes = encode(torch.randn(N, K) / spread(scale.float(), group, K) / 8, form)
    return [B.to(dtype), A.to(dtype), codes, scale, b.to(dtype) if bias else None]


def exact(x, B, A, codes, scale, b, form, group=GROUP):
    dense = dequantise(codes, None if scale is None else scale.double(), form, group, x.shape[-1]).double()
    return x.double() @ (A.double() @ B.double() + dense).mT + (0 if b is None else b.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_values(form, dtype):
    for rows, bias in (((), True), ((63,), False), ((2, 3, 5), True), ((0, 7), True)):
        x, args = torch.randn(*rows, K).to(dtype), parts(form, dtype, bias=bias)
        with fake_kernel(OP) as calls:
            y = lowrank_residual_linear(x, *args, form, GROUP)
        assert len(calls) == 1 and y.is_contiguous()
        assert_close_to(y, reference(x, *args, form, GROUP), exact(x, *args, form))


def test_fp8_codes_come_as_floats_or_as_bits():
    x, args = torch.randn(3, K), parts("fp8")
    y = lowrank_residual_linear(x, *args, "fp8", GROUP)
    args[2] = args[2].view(FP8)
    assert torch.equal(lowrank_residual_linear(x, *args, "fp8", GROUP), y)


def leaves(form, dtype=torch.float64, rows=(2, 3), K=6, N=4, group=3):
    args = [torch.randn(*rows, K, dtype=dtype), *parts(form, dtype, K, N, 2, group)]
    return [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in args]


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    def function(*args):
        return lowrank_residual_linear(*args, form, 3)

    for rows in [(2, 3), (), (0,)]:
        assert torch.autograd.gradcheck(function, leaves(form, rows=rows))
    assert torch.autograd.gradgradcheck(function, leaves(form))
    args = leaves(form)
    torch.library.opcheck(OVERLOAD, (*args, form, 3))
    y = function(*args)
    kinds = [True, True, True, form == "blockdiag", form != "blockdiag", True]
    y.sum().backward()
    assert [t is not None and t.grad is not None for t in args] == kinds


def test_gradients_of_a_ragged_last_group():
    assert torch.autograd.gradcheck(lambda *a: lowrank_residual_linear(*a, "int4", 4), leaves("int4", K=7, group=4))


def test_a_frozen_layer_does_not_keep_the_input_alive():
    args = [t if t is None else t.detach() for t in leaves("int8")]
    args[0].requires_grad_()
    y = lowrank_residual_linear(*args, "int8", 3)
    kept = [t.shape for t in y.grad_fn.saved_tensors if t is not None]
    assert args[0].shape not in kept


@pytest.mark.parametrize("form", FORMS)
def test_autocast_is_the_same_eager_and_compiled(form):
    args = leaves(form, torch.float32)
    compiled = torch.compile(lambda *a: lowrank_residual_linear(*a, form, 3), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, traced = lowrank_residual_linear(*args, form, 3), compiled(*args)
    cast = [t.bfloat16() if t is not None and t.is_floating_point() else t for t in args]
    assert eager.dtype == traced.dtype == torch.bfloat16
    assert torch.equal(eager, traced) and torch.equal(eager, reference(*cast, form, 3))
    grads = torch.autograd.grad(eager.float().sum(), [t for t in args if t is not None and t.requires_grad])
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize(("form", "of_R"), [("int8", 24 * 42), ("int4", 24 * 42), ("blockdiag", 8 * 42)])
def test_flops_are_counted(form, of_R):
    with FlopCounterMode(display=False) as counter:
        lowrank_residual_linear(torch.randn(2, 5, K), *parts(form), form, GROUP)
    assert counter.get_total_flops() == 2 * 10 * (R * (K + N) + of_R)
    with FlopCounterMode(display=False) as plain:
        reference(torch.randn(2, 5, K), *parts(form), form, GROUP)
    assert plain.get_total_flops() == counter.get_total_flops()


def test_roofline_counts_the_codes_as_they_are_stored():
    def floor(form, group=64):
        return roofline(Key(197, 768, 3072, 32, form, group, dtype=torch.bfloat16), H200)

    around = 2 * (197 + 32) * (768 + 3072)
    assert floor("int8").bytes == around + 768 * 3072 + 2 * 3072 * 12
    assert floor("int4").bytes == around + 384 * 3072 + 2 * 3072 * 12
    assert floor("blockdiag", 192).bytes == around + 2 * 3072 * 192
    assert floor("int8").flops == 2 * 197 * (32 * (768 + 3072) + 768 * 3072)
    assert floor("int8").floor_us == pytest.approx(
        1e6 * max(floor("int8").flops / 790e12, floor("int8").bytes / 4.3e12)
    )
    shape = {"M": 12608, "K": 768, "N": 768, "r": 32, "form": "int4", "group_size": 64, "dtype": torch.bfloat16}
    told = explain(OP, ceilings=H200, **shape)
    assert told.rows[0].candidate == "torch" and told.rows[0].floor_us > told.roofline.floor_us


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("int8", {"R": lambda R: R[1:]}, r"R is \[41, 24\] torch.int8.*expected \[42, 24\] torch.int8"),
        ("int8", {"R": lambda R: R.float()}, r"R is \[42, 24\] torch.float32"),
        ("int4", {"R": lambda R: R[:, 1:]}, r"R is \[42, 11\].*expected \[42, 12\] torch.uint8"),
        ("int8", {"R": lambda R: R.to("meta")}, "R is .* on meta"),
        ("int8", {"scale": lambda s: None}, r"needs a scale \[42, 3\], got None"),
        ("int8", {"scale": lambda s: s[:, 1:]}, r"scale is \[42, 2\].*expected \[42, 3\]"),
        ("int8", {"scale": lambda s: s.double()}, "scale is .*float64.*expected .*float32"),
        ("blockdiag", {"scale": lambda s: torch.ones(42, 3)}, r"has no scale, got \[42, 3\]"),
        ("int8", {"form": lambda f: "int3"}, "unknown form 'int3' of the residual, expected one of int8"),
        ("int8", {"group_size": lambda g: 0}, "group_size 0, expected 1 or more"),
        ("blockdiag", {"group_size": lambda g: 5}, "no blocks of 5 columns fit R 42x24"),
        ("int8", {"bias": lambda b: b[1:]}, r"bias \[41\] does not fit"),
        ("int8", {"x": lambda x: x[:, 1:]}, r"x \[4, 23\] and B \[6, 24\]"),
    ],
)
def test_what_does_not_fit_is_named(form, change, message):
    names = ("x", "B", "A", "R", "scale", "bias", "form", "group_size")
    args = dict(zip(names, [torch.randn(4, K), *parts(form), form, GROUP], strict=True))
    for name, function in change.items():
        args[name] = function(args[name])
    with pytest.raises(InputError, match=message):
        lowrank_residual_linear(*args.values())
