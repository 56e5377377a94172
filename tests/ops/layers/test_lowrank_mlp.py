"""`y = A₂ (B₂ act(A₁ (B₁ x) + b₁)) + b₂` as an op: values, gradients, autocast, compilers, counters, errors."""

from __future__ import annotations

import pytest
import torch
from fake_kernels import fake_kernel
from tolerance import assert_close_to
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from vitlr import ops
from vitlr.errors import InputError
from vitlr.ops.dispatch.ceilings import H200
from vitlr.ops.layers.activations import ACTIVATIONS
from vitlr.ops.layers.lowrank_mlp import Key, lowrank_mlp, reference, roofline

OVERLOAD = torch.ops.vitlr.lowrank_mlp.default
FORMS = ["both", "first", "second", "no bias"]  # which pair is low-rank, or both and no biases
MODULES = {
    "none": torch.nn.Identity(),
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU(approximate="tanh"),
    "silu": torch.nn.SiLU(),
    "sigmoid": torch.nn.Sigmoid(),
    "relu": torch.nn.ReLU(),
}


def weights(form="both", dtype=torch.float32, K=24, D=40, N=16, r1=6, r2=5):
    """(B1, A1, b1, B2, A2, b2), seeded."""
    torch.manual_seed(0)
    every = [(r1, K), (D, r1), (D,), (r2, D), (N, r2), (N,)]
    if form == "first":
        every[3:5] = [(N, D), None]
    if form == "second":
        every[0:2] = [(D, K), None]
    if form == "no bias":
        every[2] = every[5] = None
    return [None if shape is None else (torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for shape in every]


def leaves(form="both", dtype=torch.float64, rows=(2, 3), needs=(True,) * 7, **sizes):
    sizes = {"K": 3, "D": 5, "N": 4, "r1": 2, "r2": 2, **sizes}
    factors = weights(form, dtype, **sizes)
    args = [torch.randn(*rows, sizes["K"], dtype=dtype), *factors]
    return [None if arg is None else arg.requires_grad_(need) for arg, need in zip(args, needs, strict=True)]


def test_every_activation_is_the_module_of_its_name():
    x = torch.randn(100)
    assert MODULES.keys() == ACTIVATIONS.keys()
    for name, module in MODULES.items():
        assert torch.equal(ACTIVATIONS[name][0](x), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_values(act, form, dtype):
    args = weights(form, dtype)
    for rows in [(), (1,), (63,), (2, 17), (2, 3, 5), (0, 3)]:
        x = torch.randn(*rows, 24).to(dtype)
        with fake_kernel("lowrank_mlp") as calls:
            y = lowrank_mlp(x, *args, None, act)
        exact = reference(x.double(), *(None if arg is None else arg.double() for arg in args), None, act)
        assert len(calls) == 1 and y.is_contiguous()
        assert_close_to(y, reference(x, *args, None, act), exact)


def test_strided_input():
    x = torch.randn(2, 24, 3, 5).permute(0, 2, 3, 1)
    y = lowrank_mlp(x, *weights(), None, "gelu")
    assert y.is_contiguous() and torch.equal(y, lowrank_mlp(x.contiguous(), *weights(), None, "gelu"))


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    torch.library.opcheck(OVERLOAD, (*leaves(form, torch.float32), None, "gelu"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradients(act, form):
    assert torch.autograd.gradcheck(lambda *args: lowrank_mlp(*args, None, act), leaves(form), fast_mode=True)


@pytest.mark.parametrize("alone", range(7))
def test_gradients_of_what_needs_them(alone):
    needs = tuple(index == alone for index in range(7))
    args = leaves(needs=needs)
    assert torch.autograd.gradcheck(lambda *args: lowrank_mlp(*args, None, "silu"), args, fast_mode=True)
    lowrank_mlp(*args, None, "silu").sum().backward()
    assert tuple(arg.grad is not None for arg in args) == needs


def test_residual():
    args = [*leaves(), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)]
    assert torch.equal(lowrank_mlp(*args), reference(*args[:7]) + args[7])
    assert torch.autograd.gradcheck(lowrank_mlp, args, fast_mode=True)
    torch.library.opcheck(OVERLOAD, (*args, "gelu"))


def test_no_tokens_no_gradient():
    args = leaves(rows=(0,))
    lowrank_mlp(*args, None, "gelu").sum().backward()
    assert all(torch.equal(arg.grad, torch.zeros_like(arg)) for arg in args)


@pytest.mark.parametrize("act", ["none", "gelu", "gelu_tanh", "sigmoid", "relu"])
def test_second_derivatives(act):
    assert torch.autograd.gradgradcheck(lambda *args: lowrank_mlp(*args, None, act), leaves(), fast_mode=True)


def test_second_derivatives_that_torch_lacks_are_an_error_and_no_zero():
    args = leaves()
    (first,) = torch.autograd.grad(lowrank_mlp(*args, None, "silu").sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="silu_backward is not implemented"):
        first.sum().backward()


def test_autocast_is_the_same_eager_and_compiled():
    args = leaves(dtype=torch.float32)
    compiled = torch.compile(lowrank_mlp, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, eager, traced = (function(*args, None, "gelu") for function in (reference, lowrank_mlp, compiled))
    assert expected.dtype == eager.dtype == traced.dtype == torch.bfloat16
    assert torch.equal(eager, expected) and torch.equal(traced, expected)
    for y in (eager, traced):
        assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(y.sum(), args))


def test_compiled_once_for_any_number_of_rows():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lowrank_mlp, fullgraph=True, dynamic=True, backend=counter)
    for rows in (2, 5, 197, 3):
        x = torch.randn(rows, 24)
        assert torch.equal(compiled(x, *weights(), None, "gelu"), reference(x, *weights(), None, "gelu"))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("form", "size"),
    [
        ("both", 6 * (24 + 40) + 5 * (40 + 16)),
        ("first", 6 * (24 + 40) + 40 * 16),
        ("second", 24 * 40 + 5 * (40 + 16)),
    ],
)
def test_flops_are_counted(form, size):
    with FlopCounterMode(display=False) as counter:
        lowrank_mlp(torch.randn(2, 5, 24), *weights(form), None, "gelu")
    assert counter.get_total_flops() == 2 * 10 * size


def test_roofline_of_a_vit_b_mlp():
    floor = roofline(Key(12608, 768, 3072, 768, 128, 128, dtype=torch.bfloat16), H200)
    assert floor.floor_us == pytest.approx(31.4, abs=0.1)
    told = ops.explain(
        "lowrank_mlp", M=12608, K=768, D=3072, N=768, r1=128, r2=128, dtype=torch.bfloat16, ceilings=H200
    )
    # Two pairs of products at 24.3 µs each and the activation's own pass of 36 µs over the hidden tensor.
    assert told.rows[0].floor_us == pytest.approx(2 * 24.3 + 36, abs=0.3)
    assert roofline(Key(10, 768, 3072, 768, None, None)).flops == 2 * 10 * 2 * 768 * 3072


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda x: x[..., 1:], r"x \[4, 23\] and B1 \[6, 24\]"),
        (1, lambda B1: B1[1:], r"A1 \[40, 6\] and B1 \[5, 24\]"),
        (3, lambda b1: b1[1:], r"b1 \[39\] does not fit, expected \[40\]"),
        (4, lambda B2: B2[:, 1:], r"B2 \[5, 39\] does not fit the hidden width 40"),
        (5, lambda A2: A2.double(), "A2 is torch.float64 on cpu"),
        (6, lambda b2: b2[None], r"b2 \[1, 16\] does not fit, expected \[16\]"),
        (7, lambda none: torch.zeros(4, 24), r"residual \[4, 24\] does not fit, expected \[4, 16\]"),
        (8, lambda act: "quick_gelu", "unknown act 'quick_gelu', expected one of none, gelu"),
    ],
)
def test_what_does_not_fit_is_named(position, change, message):
    args = [torch.randn(4, 24), *weights(), None, "gelu"]
    args[position] = change(args[position])
    with pytest.raises(InputError, match=message):
        lowrank_mlp(*args)
