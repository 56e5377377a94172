"""The linear of 8-bit floats for Hopper, emulated: what nvcc compiles, on processors that follow the PTX ISA's rules.

No GPU is needed and none has run it yet. What is checked: bytes, scales and sums of squares against fp64 for ragged
shapes, every output written once, barriers balanced and free of deadlock, results independent of who comes first.
"""

from __future__ import annotations

import emulated_fp8 as emulated
import pytest
import torch
from emulation import ACTS, compiler

from vitlr.ops.layers.activations import ACTIVATIONS
from vitlr.ops.layers.fp8_chain import FP8, Step, scale_of, step_of

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler that knows _Float16")


def call(M, K, N, bias=True, parts=1, seed=0, size=1.0):
    """Rows (q, scale, squares [M, parts]) and the step that they meet."""
    draw = torch.Generator().manual_seed(seed)
    x = size * torch.randn(M, K, generator=draw)
    scale = scale_of(x.abs().amax(1))
    cut = torch.stack([part.square().sum(1) for part in x.tensor_split(parts, 1)], 1).contiguous()
    b = torch.randn(N, generator=draw) if bias else None
    step = step_of(torch.randn(N, K, generator=draw) / K**0.5, b)
    return ((x / scale[:, None]).to(FP8), scale, cut), step


def meant(rows, step, act):
    """act(p) in fp64, the scale, and half a step of a byte at every entry."""
    q, scale, squares = rows
    p = (q.double() @ step.codes.double().T) * scale.double()[:, None] * step.scale.double()
    y = ACTIVATIONS[act][0](p if step.bias is None else p + step.bias.double())
    reach = squares.sum(1).sqrt() * step.reach[0] + step.reach[1]
    s = scale_of(torch.ones_like(reach) if act == "sigmoid" else reach).double()
    exponent = torch.frexp((y / s[:, None]).abs())[1].clamp_min(-5)
    return y, s, torch.ldexp(s[:, None].expand_as(y), exponent - 5)


def check(rows, step, act, ctas, seed=0):
    q, scale, squares = found = emulated.emulate(rows, step, act, ctas, seed)
    y, s, half = meant(rows, step, act)
    assert torch.equal(scale.double(), s)
    assert not q.float().isnan().any()
    error = (q.double() * s[:, None] - y).abs()
    # Beside the rounding itself, sums in fp32, minimax polynomials and GELU's halves: a quarter of it.
    assert (error / half).max() <= 1.25
    total = torch.stack([part.square().sum(1) for part in y.split(emulated.COLUMNS, 1)], 1)
    # Of the length half of that, less than 416 leaves below 448 for rows that were rounded once.
    torch.testing.assert_close(squares.double(), total, rtol=0.01, atol=1e-9 * float(s.square().max()))
    return found


@pytest.mark.parametrize(
    ("shape", "ctas"),
    [
        ((1, 16, 16), 1),  # all of it smaller than a box
        ((197, 224, 400), 1),  # a rank of 224; the last tile of rows and of columns ragged
        ((197, 224, 400), 5),  # shares that begin and end within row blocks
        ((400, 192, 256), 3),  # nothing ragged but rows
        ((70, 32, 1040), 2),  # one step of depth, more tiles than slots
        ((193, 288, 144), 2),
        ((64, 384, 272), 1),
        ((200, 400, 144), 2),  # the wide tile, three slots
        ((390, 768, 144), 2),
        ((20, 64, 128), 3),  # CTAs without work
    ],
    ids=str,
)
@pytest.mark.parametrize("act", ["gelu", "none"])
def test_bytes_and_scales_are_those_of_the_formula(shape, ctas, act):
    check(*call(*shape), act, ctas)


@pytest.mark.parametrize("act", ACTS)
def test_every_activation(act):
    check(*call(70, 96, 144), act, 1)
    check(*call(70, 96, 144, bias=False), act, 1)


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e4])
def test_rows_of_any_size(size):
    rows, step = call(70, 96, 144, bias=False, size=size)
    check(rows, step, "gelu", 1)
    check(rows, step, "relu", 1)


def test_sums_of_squares_come_in_parts():
    one, many = (check(*call(70, 96, 144, parts=parts), "gelu", 1) for parts in (1, 6))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, many, strict=True))


def test_who_comes_first_does_not_change_the_result():
    rows, step = call(400, 224, 272)
    first = emulated.emulate(rows, step, "gelu", 2)
    for seed, ctas in ((1, 2), (2, 2), (3, 5), (4, 1)):
        other = emulated.emulate(rows, step, "gelu", ctas, seed)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, other, strict=True))


def test_nan_and_inf_stay_in_their_rows():
    rows, step = call(200, 96, 144)
    rows[2][3], rows[2][140] = torch.nan, torch.inf
    q, scale, squares = emulated.emulate(rows, step, "gelu", 1)
    others = [m for m in range(200) if m not in (3, 140)]
    assert scale[[3, 140]].isnan().all()
    assert torch.isfinite(scale[others]).all() and torch.isfinite(squares[others]).all()
    assert not q.float()[others].isnan().any()


@pytest.mark.parametrize("shape", [(70, 24, 64), (70, 64, 24), (70, 784, 64)], ids=str)
def test_shapes_that_are_not_taken_are_named(shape):
    with pytest.raises(AssertionError, match="expected a multiple of 16"):
        emulated.emulate(*call(*shape), "gelu", 1)


def test_gelu_in_halves_is_within_a_fifth_of_half_a_step():
    """Of every scale that holds p, beside the rounding itself."""
    p = torch.linspace(-8, 8, 40_002)
    for power in (-5, -2, 0, 5):
        s = 2.0**power
        within = p[(p.abs() <= 416 * s)]
        within = within[: len(within) // 2 * 2].contiguous()
        found = torch.empty(len(within), dtype=torch.uint8)
        emulated.library().gelu_bytes(s, within.data_ptr(), found.data_ptr(), len(within) // 2)
        exact = within.double() * torch.special.erfc(-within.double() * 0.5**0.5) / 2
        half = torch.ldexp(torch.full_like(exact, s), torch.frexp((exact / s).abs())[1].clamp_min(-5) - 5)
        error = (found.view(FP8).double() * s - exact).abs()
        assert (error / half).max() <= 1.2


def test_its_bytes_are_those_of_torch():
    codes = torch.arange(256, dtype=torch.uint8)
    floats = torch.empty(256)
    emulated.library().floats_of(codes.data_ptr(), floats.data_ptr(), 256)
    assert torch.equal(floats.nan_to_num(-1), codes.view(FP8).float().nan_to_num(-1))
    x = torch.cat([torch.linspace(-448, 448, 100_001), torch.linspace(-0.05, 0.05, 100_001), torch.tensor([1e9, -1e9])])
    found = torch.empty(len(x), dtype=torch.uint8)
    emulated.library().bytes_of(x.data_ptr(), found.data_ptr(), len(x))
    assert torch.equal(found.view(FP8).float(), x.clamp(-448, 448).to(FP8).float())


def test_a_step_without_its_scale_would_be_noticed():
    """The check is no rubber stamp."""
    rows, step = call(70, 96, 144)
    y, _, half = meant(rows, step, "gelu")
    q, scale, _ = emulated.emulate(rows, Step(step.codes, 1.02 * step.scale, step.bias, step.reach), "gelu", 1)
    assert ((q.double() * scale.double()[:, None] - y).abs() / half).max() > 1.25
