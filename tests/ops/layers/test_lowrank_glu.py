"""The gated MLP as an op: values, gradients, autocast, compilers, counters, errors."""

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
from vitlr.ops.layers.lowrank_glu import Key, lowrank_glu, reference, roofline, separate_floor

OVERLOAD = torch.ops.vitlr.lowrank_glu.default
FORMS = ["split", "packed", "dense first", "dense second", "no bias"]


def weights(form="split", dtype=torch.float32, K=24, D=40, N=16, rg=6, rv=5, r2=7):
    """(Bg, Ag, bg, Bv, Av, bv, B2, A2, b2), seeded; packed: one B, halves of one A and one bias."""
    torch.manual_seed(0)
    every = [(rg, K), (D, rg), (D,), (rv, K), (D, rv), (D,), (r2, D), (N, r2), (N,)]
    if form == "dense first":
        every[0:2] = every[3:5] = [(D, K), None]
    if form == "dense second":
        every[6:8] = [(N, D), None]
    if form == "no bias":
        every[2] = every[5] = every[8] = None
    made = [None if shape is None else (torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for shape in every]
    if form == "packed":
        A, b = (torch.randn(2 * D, rg) / rg**0.5).to(dtype), torch.randn(2 * D).to(dtype)
        made[1], made[2], made[3], made[4], made[5] = A[:D], b[:D], made[0], A[D:], b[D:]
    return made


def leaves(form="split", dtype=torch.float64, rows=(2, 3), needs=(True,) * 10):
    args = [torch.randn(*rows, 3, dtype=dtype), *weights(form, dtype, K=3, D=5, N=4, rg=2, rv=3, r2=2)]
    args = [None if arg is None else arg.clone() for arg in args]
    return [None if arg is None else arg.requires_grad_(need) for arg, need in zip(args, needs, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_values(act, form, dtype):
    args = weights(form, dtype)
    for rows in [(), (1,), (2, 17), (2, 3, 5), (0, 3)]:
        x = torch.randn(*rows, 24).to(dtype)
        with fake_kernel("lowrank_glu") as calls:
            y = lowrank_glu(x, *args, None, act)
        exact = reference(x.double(), *(None if arg is None else arg.double() for arg in args), None, act)
        assert len(calls) == 1 and y.is_contiguous()
        assert_close_to(y, reference(x, *args, None, act), exact)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    torch.library.opcheck(OVERLOAD, (*leaves(form, torch.float32), None, "silu"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradients(act, form):
    assert torch.autograd.gradcheck(lambda *args: lowrank_glu(*args, None, act), leaves(form), fast_mode=True)


@pytest.mark.parametrize("alone", range(10))
def test_gradients_of_what_needs_them(alone):
    needs = tuple(index == alone for index in range(10))
    args = leaves(needs=needs)
    assert torch.autograd.gradcheck(lambda *args: lowrank_glu(*args, None, "silu"), args, fast_mode=True)
    lowrank_glu(*args, None, "silu").sum().backward()
    assert tuple(arg.grad is not None for arg in args) == needs


def test_gradients_of_a_packed_layer_reach_its_one_weight():
    torch.manual_seed(0)
    x, B, A, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 3), (2, 3), (10, 2), (10,)))
    B2, A2 = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)

    def packed(x, B, A, b):
        return lowrank_glu(x, B, A[:5], b[:5], B, A[5:], b[5:], B2, A2, None)

    assert torch.autograd.gradcheck(packed, (x, B, A, b), fast_mode=True)


def test_residual():
    args = [*leaves(), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)]
    assert torch.equal(lowrank_glu(*args), reference(*args[:10]) + args[10])
    assert torch.autograd.gradcheck(lowrank_glu, args, fast_mode=True)
    torch.library.opcheck(OVERLOAD, (*args, "silu"))


def test_autocast_is_the_same_eager_and_compiled():
    args = leaves(dtype=torch.float32)
    compiled = torch.compile(lowrank_glu, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, eager, traced = (function(*args) for function in (reference, lowrank_glu, compiled))
    assert expected.dtype == eager.dtype == traced.dtype == torch.bfloat16
    assert torch.equal(eager, expected) and torch.equal(traced, expected)
    for y in (eager, traced):
        assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(y.sum(), args))


def test_compiled_once_for_any_number_of_rows():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lowrank_glu, fullgraph=True, dynamic=True, backend=counter)
    for rows in (2, 5, 197):
        x = torch.randn(rows, 24)
        assert torch.equal(compiled(x, *weights("packed")), reference(x, *weights("packed")))
    assert counter.frame_count == 1


def test_flops_are_counted():
    with FlopCounterMode(display=False) as counter:
        lowrank_glu(torch.randn(2, 5, 24), *weights())
    assert counter.get_total_flops() == 2 * 10 * (6 * (24 + 40) + 5 * (24 + 40) + 7 * (40 + 16))


def test_a_shared_factor_counts_once():
    key = Key(12608, 768, 2048, 768, 128, 128, 128, dtype=torch.bfloat16)
    once, twice = roofline(key._replace(shared=True)), roofline(key)
    assert twice.flops - once.flops == 2 * 12608 * 128 * 768
    assert twice.bytes - once.bytes == 2 * 128 * 768


def test_the_key_says_whether_the_factor_is_shared():
    keys = []
    with fake_kernel("lowrank_glu", lambda key: keys.append(key)):
        lowrank_glu(torch.randn(3, 24), *weights("packed"))
        lowrank_glu(torch.randn(3, 24), *weights("dense first"))
    assert [(key.rg, key.rv, key.r2, key.shared) for key in keys] == [(6, 6, 7, True), (None, None, 7, False)]


def test_explained():
    sizes = {"M": 12608, "K": 768, "D": 2048, "N": 768, "rg": 128, "rv": 128, "r2": 128, "dtype": torch.bfloat16}
    told = ops.explain("lowrank_glu", ceilings=H200, **sizes)
    assert told.chosen == "torch" and told.roofline.floor_us < told.rows[0].floor_us
    assert told.rows[0].floor_us == separate_floor(Key(**sizes), H200)


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda x: x[..., 1:], r"x \[4, 23\] and Bg \[6, 24\]"),
        (2, lambda Ag: Ag[:, 1:], r"Ag \[40, 5\] and Bg \[6, 24\]"),
        (5, lambda Av: Av[1:], "bv"),
        (7, lambda B2: B2[:, 1:], r"B2 \[7, 39\] does not fit the hidden width 40"),
        (9, lambda b2: b2.double(), "b2 is torch.float64 on cpu"),
        (10, lambda none: torch.zeros(4, 24), r"residual \[4, 24\] does not fit, expected \[4, 16\]"),
        (11, lambda act: "quick_gelu", "unknown act 'quick_gelu'"),
    ],
)
def test_what_does_not_fit_is_named(position, change, message):
    args = [torch.randn(4, 24), *weights(), None, "silu"]
    args[position] = change(args[position])
    with pytest.raises(InputError, match=message):
        lowrank_glu(*args)


def test_gate_and_value_of_different_widths():
    args = weights("no bias")
    args[4] = args[4][1:]
    with pytest.raises(InputError, match="they are 40 and 39 wide"):
        lowrank_glu(torch.randn(4, 24), *args)
