"""`int8_chain` as an op: its shapes, its refusals, graphs, and that its numbers mean what its docstring says."""

from __future__ import annotations

import pytest
import torch
from int8_steps import columns, step, unambiguous

from vitlr import ops
from vitlr.errors import InputError
from vitlr.ops.backends import native
from vitlr.ops.layers.int8_chain import LIMIT, Norm, Step, int8_chain, reference


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_a_linear_is_its_weight_times_what_the_bytes_stand_for():
    W, x = torch.randn(12, 20).double(), torch.rand(5, 20).double() * 6 - 2
    low, width = x.min(0).values, x.max(0).values - x.min(0).values
    multiplier, shift = 255 / width, -low * 255 / width
    folded = W / multiplier
    scale = folded.abs().amax(1) / 127
    codes = (folded / scale[:, None]).round().to(torch.int8)
    bias = torch.randn(12).double()
    whole = bias - scale * (codes.double() @ shift)
    y = reference(x, *columns([Step(codes, scale, whole, multiplier, shift)]), None, ["none"])
    q = (x * multiplier + shift).round()
    expected = ((q - shift) / multiplier) @ (codes * scale[:, None] * multiplier).T + bias
    torch.testing.assert_close(y, expected)
    assert (y - (x @ W.T + bias)).norm() < 0.02 * (x @ W.T).norm()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_opcheck(monkeypatch, backend):
    if backend == "cpu" and not native.available():
        pytest.skip(str(native.why_not()))
    monkeypatch.setenv("VITLR_BACKEND", backend)
    steps = [step(8, 12, 2), step(12, 5)]
    norm = [torch.rand(8), torch.randn(8)]
    x, residual = unambiguous(6, steps[0]).view(2, 3, 8), torch.randn(2, 3, 5)
    args = (x, *columns(steps), residual, ["gelu", "none"], norm, 1e-5)
    torch.library.opcheck(torch.ops.vitlr.int8_chain.default, args)


def test_compiled_for_any_number_of_rows():
    steps = [step(24, 40), step(40, 16, 3)]
    run = torch.compile(
        lambda x: int8_chain(x, steps, ["gelu", "none"]), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (2, 5, 197):
        x = unambiguous(rows, steps[0])
        assert torch.equal(run(x), int8_chain(x, steps, ["gelu", "none"]))


def test_a_gradient_is_refused():
    x = torch.randn(3, 8, requires_grad=True)
    y = int8_chain(x, [step(8, 4)], ["none"])
    with pytest.raises(InputError, match="no gradient: layers of bytes are for running"):
        y.sum().backward()


def test_operations_are_counted():
    told = ops.explain("int8_chain", M=10, widths=(8, 12, 5), acts=("gelu", "none"))
    assert told.roofline.flops == 2 * 10 * (8 * 12 + 12 * 5)
    assert told.roofline.bytes == 4 * 10 * (8 + 5) + 8 * 12 + 12 * 5
    more = ops.explain("int8_chain", M=10, widths=(8, 12, 5), acts=("gelu", "none"), more=(0, 3))
    assert more.roofline.flops == 2 * 10 * (8 * 12 + 15 * 5)


@pytest.mark.parametrize(
    ("norm", "match"),
    [
        (
            Norm(torch.ones(7), torch.zeros(8), 1e-5),
            r"gamma is torch.float32 \[7\] on cpu, expected torch.float32 \[8\]",
        ),
        (Norm(torch.ones(8), torch.zeros(8).half(), 1e-5), "beta is torch.float16"),
        (Norm(torch.ones(8), torch.zeros(8), -1.0), "eps is -1.0, expected 0 or more"),
    ],
    ids=["gamma", "beta", "eps"],
)
def test_a_norm_that_does_not_fit_is_told(norm, match):
    with pytest.raises(InputError, match=match):
        int8_chain(torch.zeros(3, 8), one(), ["none"], norm=norm)


def one(**changes):
    return [step(8, 4)._replace(**changes)]


@pytest.mark.parametrize(
    ("x", "steps", "acts", "match"),
    [
        (torch.zeros(3, 7), one(), ["none"], r"codes 0 are torch.int8 \[4, 8\], expected int8 \[N, 7\]"),
        (torch.zeros(3, 8), one(codes=torch.zeros(4, 8)), ["none"], r"codes 0 are torch.float32"),
        (torch.zeros(3, 8, dtype=torch.int64), one(), ["none"], "x is torch.int64"),
        (torch.tensor(1.0), one(), ["none"], "expected floating point"),
        (torch.zeros(3, 8), one(scale=torch.zeros(8)), ["none"], r"scale 0 is torch.float32 \[8\], expected .* \[4\]"),
        (torch.zeros(3, 8), one(shift=torch.zeros(8).half()), ["none"], "shift 0 is torch.float16"),
        (torch.zeros(3, 8), one(bias=torch.zeros(4, device="meta")), ["none"], "step 0 is on"),
        (
            torch.zeros(3, 8),
            one(wide=torch.zeros(2)),
            ["none"],
            r"wide 0 is torch.float32 \[2\], expected torch.int32 \[R\]",
        ),
        (torch.zeros(3, 8), one(wide=torch.zeros(2, dtype=torch.int32)), ["none"], r"expected int8 \[N, 10\]"),
        (torch.zeros(3, 8), one(), ["swish"], "unknown act 'swish'"),
        (torch.zeros(3, 8), one(), ["none", "none"], "1 codes and 2 acts"),
        (torch.zeros(3, 8), [*one(), *one()], ["none", "none"], r"codes 1 .* expected int8 \[N, 4\]"),
        (
            torch.zeros(1, LIMIT + 1),
            [Step(torch.zeros(1, LIMIT + 1, dtype=torch.int8), *(torch.zeros(1),) * 2, *(torch.zeros(LIMIT + 1),) * 2)],
            ["none"],
            "K up to 65536",
        ),
    ],
)
def test_what_does_not_fit_is_told(x, steps, acts, match):
    with pytest.raises(InputError, match=match):
        int8_chain(x, steps, acts)


def test_a_residual_that_does_not_fit_is_told():
    with pytest.raises(InputError, match=r"residual \[3, 5\] does not fit, expected \[3, 4\]"):
        int8_chain(torch.zeros(3, 8), one(), ["none"], torch.zeros(3, 5))


def test_half_precision_is_left_to_torch():
    told = ops.explain("int8_chain", M=10, widths=(8, 12), acts=("none",), dtype=torch.float16)
    assert told.chosen == "torch" and "fp32 or bf16" in str(told)
