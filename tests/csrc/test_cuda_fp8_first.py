"""Rows to bytes and their first linear for Hopper, emulated: what nvcc compiles, on processors that follow the PTX ISA.

No GPU is needed and none has run it yet. What is checked: bytes, scales and sums of squares against fp64 for ragged
shapes, every output written once, barriers balanced and free of deadlock, results independent of who comes first.
"""

from __future__ import annotations

import emulated_fp8_first as emulated
import pytest
import torch
import torch.nn.functional as F
from emulation import compiler

from vitlr.ops.layers.fp8_chain import FP8, scale_of, step_of

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler that knows _Float16")
EPS = 1e-6


def call(M, K, r, bias=True, norm=False, dtype=torch.bfloat16, size=1.0, seed=0):
    """x [M, K], the step that its rows meet, and gamma and beta."""
    draw = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    x = (size * random(M, K) + norm * random(M, 1)).to(dtype)
    step = step_of(random(r, K) / K**0.5, random(r) if bias else None)
    return x, step, [(1 + random(K) / 4).to(dtype), random(K).to(dtype)] if norm else []


def rows_of(x, norm):
    """Rows after the norm in fp64."""
    return F.layer_norm(x.double(), x.shape[1:], *(t.double() for t in norm), EPS) if norm else x.double()


def check(x, step, norm=(), processors=1, seed=0):
    found = q, scale, squares = emulated.emulate(x, step, processors, norm, EPS, seed=seed)
    rows = rows_of(x, norm)
    s = scale_of(rows.abs().amax(1)).double()[:, None]
    p = ((rows / s).float().to(FP8).double() * s) @ (step.codes.double() * step.scale.double()[:, None]).T
    p = p if step.bias is None else p + step.bias.double()
    reach = rows.norm(dim=1) * step.reach[0].double() + step.reach[1].double()
    assert torch.equal(scale, scale_of(reach))
    assert not q.float().isnan().any()
    # A norm in fp32 may round an entry of x to the other one of two neighbours: in a few rows, one step of 1/16.
    spread = (step.codes.double() * step.scale.double()[:, None]).abs().amax(1)
    slack = spread * rows.abs().amax(1, keepdim=True) / 14 if norm else 0
    s = scale.double()[:, None].expand_as(p)
    half = torch.ldexp(s, torch.frexp((p / s).abs())[1].clamp_min(-5) - 5)  # of a step of a byte
    off = (q.double() * s - p).abs() - 1.05 * half
    assert (off <= slack).all()
    assert (off > 0).double().mean() <= (0.02 if norm else 0)
    torch.testing.assert_close(squares[:, 0].double(), p.square().sum(1), rtol=0.01 if norm else 1e-4, atol=1e-30)
    return found


@pytest.mark.parametrize(
    ("shape", "processors"),
    [
        ((1, 16, 16), 1),  # all of it smaller than a box
        ((70, 768, 224), 1),  # three groups of rows, the last one ragged
        ((197, 768, 224), 2),  # shares of three and four
        ((300, 768, 224), 9),  # ten groups for nine: one or two each
        ((100, 400, 208), 2),  # K that ends within a panel, a rank within a warpgroup
        ((64, 384, 192), 1),  # a warpgroup without columns
        ((64, 272, 64), 1),  # three of them
        ((40, 192, 80), 3),  # fewer groups than processors
        ((50, 768, 256), 2),  # the tile of sixteen rows
        ((33, 768, 240), 1),
        ((129, 144, 48), 1),
    ],
    ids=str,
)
def test_bytes_and_scales_are_those_of_the_formula(shape, processors):
    check(*call(*shape), processors=processors)
    check(*call(*shape, bias=False, norm=True), processors=processors)


def test_fp16():
    check(*call(70, 272, 112, dtype=torch.float16))
    check(*call(70, 272, 112, dtype=torch.float16, norm=True), processors=2)


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e4])
def test_rows_of_any_size(size):
    check(*call(70, 144, 96, bias=False, size=size))


def test_rows_of_zeros():
    x, step, _ = call(70, 144, 96)
    x[3] = 0
    q, scale, squares = check(x, step)
    assert torch.equal(scale[3], scale_of(step.reach[1]))
    torch.testing.assert_close(squares[3, 0], step.bias.square().sum())
    x, step, _ = call(70, 144, 96, bias=False)
    x[3] = 0
    q, scale, squares = emulated.emulate(x, step, 1)
    assert (q[3].float() == 0).all() and scale[3] > 0 and squares[3] == 0


@pytest.mark.parametrize("norm", [False, True])
def test_nan_and_inf_stay_in_their_rows(norm):
    x, step, norm = call(200, 144, 112, norm=norm)
    x[3, 5], x[140, 9] = torch.nan, torch.inf
    q, scale, squares = emulated.emulate(x, step, 2, norm, EPS)
    others = [m for m in range(200) if m not in (3, 140)]
    for found in (scale[:, None], squares):
        assert found[[3, 140]].isnan().all() and torch.isfinite(found[others]).all()
    assert q.float()[[3, 140]].isnan().all() and not q.float()[others].isnan().any()


def test_who_comes_first_does_not_change_the_result():
    x, step, norm = call(300, 400, 224, norm=True)
    first = emulated.emulate(x, step, 2, norm, EPS)
    for seed, processors in ((1, 2), (2, 2), (3, 3), (4, 1)):
        other = emulated.emulate(x, step, processors, norm, EPS, seed=seed)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, other, strict=True))


def test_flags_of_the_launch_behind_it_become_zero():
    x, step, _ = call(70, 144, 96)
    flags = torch.full((264,), 7, dtype=torch.int32)
    emulated.emulate(x, step, 2, flags=flags[:260])
    assert (flags[:260] == 0).all() and (flags[260:] == 7).all()


@pytest.mark.parametrize("shape", [(70, 24, 64), (70, 64, 24), (70, 784, 64), (70, 64, 272)], ids=str)
def test_shapes_that_are_not_taken_are_named(shape):
    with pytest.raises(AssertionError, match="expected a multiple of 16"):
        emulated.emulate(*call(*shape)[:2], 1)


@pytest.mark.parametrize("part", ["scale", "bias", "codes"])
def test_a_step_in_another_order_would_be_noticed(part):
    """The check is no rubber stamp."""
    x, step, _ = call(70, 144, 96)
    spoilt = step._replace(**{part: getattr(step, part).view(torch.uint8).roll(1, 0).view(getattr(step, part).dtype)})
    q, scale, _ = emulated.emulate(x, spoilt, 1)
    right, same, _ = check(x, step)
    assert torch.equal(scale, same) and (q.float() != right.float()).double().mean() > 0.1
