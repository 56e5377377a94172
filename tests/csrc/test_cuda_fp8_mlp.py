"""The MLP of 8-bit floats for Hopper, emulated: what nvcc compiles, on processors that follow the PTX ISA's rules.

No GPU is needed and none has run it yet. What is checked: y against fp64 for ragged shapes and shares of the work,
every output written once, what CTAs leave for each other, barriers balanced and free of deadlock, whoever comes first.
"""

from __future__ import annotations

from itertools import pairwise

import emulated_fp8_mlp as emulated
import pytest
import torch
from emulation import ACTS, compiler
from tolerance import assert_close_to

from vitlr.ops.layers import fp8_chain
from vitlr.ops.layers.fp8_chain import FP8, scale_of, step_of

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler that knows _Float16")


def call(M, r1, D, r2, N, bias=True, parts=1, size=1.0, dtype=torch.bfloat16, seed=0):
    """x [M, r1], its rows (q, scale, squares), the three steps that they meet, and a residual."""
    draw = torch.Generator().manual_seed(seed)
    x = size * torch.randn(M, r1, generator=draw)
    scale = scale_of(x.abs().amax(1))
    cut = torch.stack([part.square().sum(1) for part in x.tensor_split(parts, 1)], 1).contiguous()
    biases = [torch.randn(N, generator=draw) if bias else None for N in (D, r2, N)]
    steps = [
        step_of(torch.randn(N, K, generator=draw) / K**0.5, b)
        for (K, N), b in zip(pairwise((r1, D, r2, N)), biases, strict=True)
    ]
    return x, ((x / scale[:, None]).to(FP8), scale, cut), steps, torch.randn(M, N, generator=draw).to(dtype)


def check(made, act="gelu", processors=1, residual=True, seed=0, computed=None):
    """y by the steps of a call, or by those in their place."""
    x, rows, steps, added = made
    added = added if residual else None
    y = emulated.emulate(rows, computed or steps, act, processors, added, made[3].dtype, seed)
    columns = [list(column) for column in zip(*steps, strict=True)]
    acts = [act, "none", "none"]
    plain = fp8_chain.reference(x, *columns, added, acts).to(y.dtype)
    exact = fp8_chain.reference(x.double(), *columns, None if added is None else added.double(), acts)
    assert_close_to(y, plain, exact)
    return y


@pytest.mark.parametrize(
    ("shape", "processors"),
    [
        ((1, 16, 16, 16, 16), 1),  # all of it smaller than a box
        ((70, 64, 144, 48, 48), 1),  # ranks far below their class, one of them a column of a step
        ((300, 224, 400, 224, 272), 1),  # row blocks one after the other
        ((300, 224, 400, 224, 272), 3),  # a row block each; the last slice of the hidden and tile of y ragged
        ((300, 192, 640, 176, 144), 2),  # shares that begin within row blocks
        ((600, 224, 1040, 224, 272), 5),  # ... and row blocks that three CTAs share
        ((130, 256, 1296, 240, 160), 9),  # five CTAs a row block, some of which begin none
        ((128, 240, 1024, 256, 128), 2),  # nothing ragged but the rank
        ((20, 64, 128, 64, 64), 3),  # one unit: one CTA
    ],
    ids=str,
)
def test_y_is_that_of_the_formula(shape, processors):
    check(call(*shape), processors=processors)


@pytest.mark.parametrize("act", ACTS)
def test_every_activation(act):
    check(call(70, 64, 272, 32, 48), act)
    check(call(70, 64, 272, 32, 48, bias=False), act, residual=False)


def test_fp16():
    check(call(150, 96, 528, 64, 48, dtype=torch.float16), processors=2)


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e3])
def test_rows_of_any_size(size):
    check(call(70, 96, 272, 64, 48, bias=False, size=size), residual=False)


def test_sums_of_squares_come_in_parts():
    one, many = (check(call(70, 96, 272, 64, 48, parts=parts)) for parts in (1, 6))
    assert torch.equal(one, many)


def test_who_comes_first_does_not_change_the_result():
    made = call(300, 224, 1040, 224, 144)
    first = check(made, processors=4)
    for seed in (1, 2):
        assert torch.equal(first, check(made, processors=4, seed=seed))


@pytest.mark.parametrize("processors", [1, 3])
def test_nan_and_inf_stay_in_their_rows(processors):
    _, rows, steps, added = call(200, 96, 1040, 64, 48)
    rows[2][3], rows[2][140] = torch.nan, torch.inf
    y = emulated.emulate(rows, steps, "gelu", processors, added)
    others = [m for m in range(200) if m not in (3, 140)]
    assert y[[3, 140]].isnan().all() and torch.isfinite(y[others]).all()


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((70, 24, 64, 32, 32), "r1 = 24, expected a multiple of 16"),
        ((70, 32, 72, 32, 32), "D = 72, expected a multiple of 16"),
        ((70, 32, 64, 272, 32), "ranks 32 and 272, expected at most 256"),
    ],
    ids=str,
)
def test_shapes_that_are_not_taken_are_named(shape, why):
    _, rows, steps, added = call(*shape)
    with pytest.raises(AssertionError, match=why):
        emulated.emulate(rows, steps, "gelu", 1, added)


@pytest.mark.parametrize("part", ["scale", "bias"])
@pytest.mark.parametrize("linear", [0, 1, 2])
def test_a_vector_in_another_order_would_be_noticed(linear, part):
    """The check is no rubber stamp."""
    x, rows, steps, added = call(70, 96, 272, 64, 48)
    of = getattr(steps[linear], part).roll(1)
    spoilt = [step._replace(**{part: of}) if i == linear else step for i, step in enumerate(steps)]
    with pytest.raises(AssertionError):
        check((x, rows, steps, added), computed=spoilt)
