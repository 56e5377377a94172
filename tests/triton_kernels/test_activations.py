"""Activations inside kernels against float64, over every fp16 number and every bf16 number."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from tolerance import assert_close_to

from vitlr.ops.layers.activations import ACTIVATIONS
from vitlr.ops.layers.fp8_chain import scale_of
from vitlr.triton_kernels.activations import INSTRUCTIONS, activate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
ALL = {**DTYPES, torch.float8_e4m3fn: tl.float8e4nv}


@triton.jit
def _kernel(x, y, n, ACT: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, activate(p, ACT, OUT), mask=i < n)


def apply(p: torch.Tensor, act: str, dtype: torch.dtype) -> torch.Tensor:
    """`activate` on fp32 values, before they are rounded to dtype."""
    p = p.float().to(DEVICE)
    y = torch.full_like(p, math.nan)
    _kernel[(triton.cdiv(len(p), 65536),)](p, y, len(p), act, ALL[dtype], 65536)
    return y.cpu()


def every(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a 16-bit dtype."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


def test_gelu_for_e4m3_is_a_ninth_of_half_a_step_away_at_most():
    # A row that holds p has a scale of |p| / 416 at least, a power of two, and steps no finer than 2^-9 of that.
    p = torch.cat([torch.linspace(-30, 30, 200_001), every(torch.float16).float()])
    exact = EXACT["gelu"](p.double())
    least = scale_of(p.abs()).double()
    exponent = torch.frexp((exact.abs() / least).clamp_min(2.0**-6))[1] - 1
    error = (apply(p, "gelu", torch.float8_e4m3fn).double() - exact).abs() / least
    worst = (error / torch.ldexp(torch.ones_like(exact), exponent - 4)).max().item()
    assert 0.09 <= worst <= 0.11, worst  # no looser than what is seen


def half_ulp(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance of neighbours of dtype at a value; subnormal fp16 counts, bf16 counts as if fp32 flushed."""
    digits, least = (10, -14) if dtype == torch.float16 else (7, -126)
    exponent = torch.frexp(exact.abs().clamp_min(2.0**least))[1] - 1  # 2^e <= |exact|
    return torch.ldexp(torch.ones_like(exact), exponent - digits - 1)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.30), (torch.bfloat16, 0.97)], ids=str)
def test_gelu_is_within_half_an_ulp_of_the_result(dtype, bound):
    # Beside the dtype's own numbers, what accumulators hold in between: fp32 values where the tail is steep.
    p = torch.cat([every(dtype).float(), torch.linspace(-15, 15, 200_001)])
    exact = EXACT["gelu"](p.double())
    error = (apply(p, "gelu", dtype).double() - exact).abs()
    flushed = 2.0**-126 if dtype == torch.bfloat16 else 0.0  # what leaves fp32's normal numbers may become zero
    error = torch.where(exact.abs() < flushed, torch.zeros_like(error), error)
    worst = (error / half_ulp(exact, dtype)).max().item()
    assert worst <= bound, worst
    assert worst >= bound - 0.02  # the bound told in the docstring is no looser than what is seen


def test_gelu_that_leaves_the_normal_numbers_vanishes():
    p = torch.tensor([-13.5, -20.0, -1e4, -3e38])
    assert (apply(p, "gelu", torch.bfloat16).abs() < 2.0**-126).all()
    assert (apply(p, "gelu", torch.float16).half() == 0).all()


# In float64 without cancellation: torch's own gelu there loses the negative tail.
EXACT = {
    **{name: function for name, (function, _) in ACTIVATIONS.items()},
    "gelu": lambda p: 0.5 * p * torch.special.erfc(-p / math.sqrt(2)),
    "gelu_tanh": lambda p: p * torch.sigmoid(math.sqrt(8 / math.pi) * (p + 0.044715 * p**3)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", EXACT)
def test_results_in_16_bits_are_a_neighbour_of_the_exact_value(act, dtype):
    p = every(dtype)
    exact = EXACT[act](p.double())
    error = (apply(p, act, dtype).to(dtype).double() - exact).abs()
    least = 2.0**-120 if dtype == torch.bfloat16 else 0.0  # what leaves fp32's normal numbers on the way may be zero
    assert (error <= 2 * half_ulp(exact, dtype) + least).all()


@pytest.mark.parametrize("act", EXACT)
def test_results_in_fp32_are_as_good_as_torchs(act):
    p = torch.linspace(-12, 12, 100_001)
    exact = EXACT[act](p.double())
    assert_close_to(apply(p, act, torch.float32), ACTIVATIONS[act][0](p), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_and_infinities_are_torchs(act, dtype):
    p = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    expected = ACTIVATIONS[act][0](p.double())  # F.gelu(inf) is NaN in fp32 and bf16 on the CPU, inf in fp16, fp64
    torch.testing.assert_close(apply(p, act, dtype).double(), expected, rtol=0, atol=0, equal_nan=True)


def test_the_floor_knows_every_activation():
    assert ACTIVATIONS.keys() <= INSTRUCTIONS.keys()
