"""The low-rank kernels for Hopper, emulated: what nvcc compiles, on processors that follow the PTX ISA's rules.

No GPU is needed and none has run these kernels yet. What is checked: values against fp64 for ragged shapes, every
output written once, barriers balanced and free of deadlock, results independent of who comes first.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import sys
from pathlib import Path

import emulated_lowrank as emulated
import pytest
import torch
from tolerance import assert_close_to

from vitlr.ops.layers import lowrank_linear, lowrank_mlp
from vitlr.ops.layers.activations import ACTIVATIONS

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler that knows _Float16")

BF16, FP16 = torch.bfloat16, torch.float16
ROOT = Path(__file__).parents[2]


def tensor(*shape, dtype=BF16):
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)


def mlp(M, K, D, N, r1, r2, dtype=BF16, bare=False, act="gelu"):
    """(x, B1, A1, b1, B2, A2, b2, residual, act)."""
    sizes = [(M, K), (r1, K), (D, r1), (D,), (r2, D), (N, r2), (N,), (M, N)]
    args = [tensor(*size, dtype=dtype) for size in sizes]
    if bare:
        args[3] = args[6] = args[7] = None
    return [*args, act]


def linear(M, K, N, r, dtype=BF16, act="silu"):
    x, B, A, bias, residual = (tensor(*size, dtype=dtype) for size in ((M, K), (r, K), (N, r), (N,), (M, N)))
    return [x, B, None, None, None, A, bias, residual, act]


def check(args, plan):
    if args[2] is None:
        x, B, _, _, _, A, bias, residual, act = args
        given, reference = (x, B, A, bias, residual, act), lowrank_linear.reference
    else:
        given, reference = args, lowrank_mlp.reference
    exact = reference(*(arg.double() if isinstance(arg, torch.Tensor) else arg for arg in given))
    assert_close_to(emulated.emulate(args, plan), reference(*given), exact)


# plan: R, warpgroups, CTAs a cluster, clusters, clusters a row block. Shapes: M, K, D, N, r1, r2.
@pytest.mark.parametrize(
    ("plan", "shape"),
    [
        ((64, 1, 1, 1, 1), (1, 8, 8, 8, 8, 8)),  # everything smaller than a box
        ((64, 1, 1, 2, 1), (63, 72, 200, 104, 56, 64)),  # a cluster without work
        ((64, 3, 1, 1, 1), (197, 64, 128, 128, 64, 64)),  # one hidden tile, nothing ragged but rows
        ((64, 3, 8, 1, 1), (200, 72, 1032, 1096, 64, 40)),  # a share of one or two tiles each
        ((128, 1, 8, 2, 1), (130, 72, 1000, 200, 128, 128)),  # more ranks than output tiles
        ((128, 3, 1, 1, 1), (192, 1032, 96, 8, 128, 128)),  # more steps of K than slots
        ((128, 3, 1, 2, 1), (1000, 72, 296, 136, 104, 72)),  # three items a cluster
        ((128, 3, 2, 1, 1), (400, 136, 968, 200, 128, 96)),  # items and a cluster
        ((128, 3, 4, 1, 1), (200, 72, 392, 136, 72, 128)),
        ((192, 1, 2, 1, 1), (70, 72, 264, 136, 136, 192)),
        ((192, 2, 1, 2, 1), (300, 72, 264, 136, 192, 136)),
        ((192, 2, 8, 1, 1), (260, 72, 1032, 136, 192, 192)),
        ((256, 2, 1, 1, 1), (130, 264, 520, 264, 256, 200)),
        ((256, 2, 4, 1, 1), (260, 72, 520, 136, 208, 256)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_mlp(plan, shape, dtype):
    check(mlp(*shape, dtype=dtype), plan)


# plan as above, shape: M, K, N, r.
@pytest.mark.parametrize(
    ("plan", "shape"),
    [
        ((64, 1, 1, 1, 1), (1, 8, 8, 8)),
        ((64, 1, 2, 3, 4), (197, 200, 1096, 40)),
        ((128, 1, 8, 1, 1), (63, 520, 136, 128)),  # one or two steps of K each
        ((128, 1, 8, 2, 1), (200, 1032, 1032, 72)),  # two items a cluster
        ((192, 1, 4, 4, 2), (130, 264, 520, 192)),
        ((256, 1, 2, 2, 2), (100, 136, 264, 256)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_linear(plan, shape, dtype):
    check(linear(*shape, dtype=dtype), plan)


@pytest.mark.parametrize("act", emulated.ACTS)
def test_every_activation(act):
    check(mlp(70, 72, 200, 104, 56, 64, act=act, bare=act == "none"), (64, 3, 1, 1, 1))
    check(linear(70, 72, 104, 56, act=act), (64, 1, 1, 1, 1))


def test_strided_rows():
    args = mlp(70, 72, 200, 104, 56, 64)
    whole = emulated.emulate(args, (64, 1, 1, 1, 1))
    for i in (0, 1, 2, 4, 5, 7):
        rows, columns = args[i].shape
        args[i] = torch.cat([args[i], torch.full((rows, 8), torch.nan, dtype=BF16)], 1)[:, :columns]
    assert torch.equal(emulated.emulate(args, (64, 1, 1, 1, 1)), whole)


@pytest.mark.parametrize("plan", [(128, 3, 1, 1, 1), (128, 3, 2, 1, 1), (192, 2, 2, 1, 1), (64, 1, 4, 1, 1)], ids=str)
def test_who_comes_first_does_not_change_the_result(plan):
    r = plan[0] - 24
    args = mlp(200, 72, 552, 136, r, r)
    first = emulated.emulate(args, plan)
    assert all(torch.equal(first, emulated.emulate(args, plan, seed)) for seed in range(1, 5))


@pytest.mark.parametrize("ranks", [1, 2])
def test_nan_and_inf_stay_in_their_rows(ranks):
    """And what fills ragged widths with zeros does not make NaN of an Inf."""
    args = mlp(200, 72, 200, 104, 72, 88, act="relu")
    for i in (1, 2, 4, 5):
        args[i] = args[i].abs()
    args[0][3, 5], args[0][140, 71] = torch.nan, torch.inf
    y = emulated.emulate(args, (128, 3, ranks, 1, 1))
    assert y[3].isnan().all() and y[140].isposinf().all()
    assert torch.isfinite(y[[m for m in range(200) if m not in (3, 140)]]).all()


def every(dtype):
    """All finite numbers of a 16-bit dtype."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


@pytest.mark.parametrize(("dtype", "bound"), [(FP16, 0.30), (BF16, 0.97)], ids=str)
def test_gelu_is_within_half_an_ulp_of_the_result(dtype, bound):
    p = torch.cat([every(dtype).float(), torch.linspace(-15, 15, 200_001)])
    exact = p.double() * torch.special.erfc(-p.double() * 0.5**0.5) / 2
    digits, least = (10, -14) if dtype == FP16 else (7, -126)
    half_ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact.abs().clamp_min(2.0**least))[1] - digits - 2)
    error = (emulated.activations("gelu", dtype, p).double() - exact).abs()
    error[exact.abs() < 2.0**-126] = 0  # what leaves fp32's normal numbers may become zero
    assert (error / half_ulp).max() <= bound


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("act", emulated.ACTS)
def test_activations(act, dtype):
    p = torch.cat([torch.linspace(-20, 20, 8001), torch.tensor([1e-30, -1e-4, 80.0, -80.0, 1e4, -1e4])]).to(dtype)
    exact = ACTIVATIONS[act][0](p.double())
    assert_close_to(emulated.activations(act, dtype, p.float()).to(dtype), ACTIVATIONS[act][0](p), exact)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf])
    y, expected = emulated.activations(act, dtype, special), ACTIVATIONS[act][0](special.double())
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


def test_plans_of_a_vit_b_fill_an_h200():
    assert emulated.planned(12608, 768, 3072, 768, 128, 128)[0] == (128, 3, 2, 66, 1)  # 132 CTAs in one wave
    assert emulated.planned(50432, 768, 3072, 768, 128, 128)[0] == (128, 3, 1, 132, 1)  # 263 row blocks, two waves
    assert emulated.planned(197, 768, 3072, 768, 96, 128)[0] == (128, 1, 8, 4, 1)  # the largest cluster
    assert emulated.planned(197, 3072, 0, 768, 128, 128)[0][2] > 1  # K split among the CTAs of a cluster


@pytest.mark.parametrize("M", [0, 1, 63, 64, 197, 1000, 1576, 12608, 50432, 10**6])
@pytest.mark.parametrize("r", [8, 64, 72, 128, 192, 200, 256])
@pytest.mark.parametrize("D", [0, 8, 200, 3072])
def test_a_plan_covers_its_shape(M, r, D):
    (R, warpgroups, ranks, clusters, groups), time = emulated.planned(M, 768, D, 776, r, r)
    assert R - 64 < r <= R and ranks in (1, 2, 4, 8) and math.isfinite(time)
    assert clusters * ranks <= 132 and clusters <= max(1, math.ceil(M / (64 * warpgroups))) * groups
    assert ranks <= (math.ceil(D / (96 if (R, warpgroups) in ((128, 3), (256, 2)) else 128)) if D else 12)
    assert groups == 1 or D == 0


def test_ranks_beyond_the_registers_have_no_plan():
    assert emulated.planned(197, 768, 3072, 768, 264, 64)[0][0] == 0


def test_a_cluster_that_misses_a_share_is_noticed():
    """The emulation is no rubber stamp: with more CTAs than hidden tiles some have nothing to wait for."""
    with pytest.raises(AssertionError, match=r"deadlock|breach"):
        emulated.emulate(mlp(64, 64, 128, 64, 64, 64), (64, 1, 4, 1, 1))


def test_a_deadlock_names_the_barrier():
    """By the same words as the debug build on a GPU."""
    with pytest.raises(AssertionError, match=r"barrier (full|empty|ready|taken|incoming|gathered) \d of CTA \d"):
        emulated.emulate(mlp(64, 64, 128, 64, 64, 64), (64, 1, 4, 1, 1))


@pytest.mark.parametrize(("barrier", "name"), [(0, "full 0"), (56, "full 7"), (64, "empty 0"), (120, "empty 7")])
def test_the_note_of_a_hang_in_words(barrier, name):
    said = ctypes.create_string_buffer(200)
    emulated.library().hang(7, 5, barrier, 1, said, len(said))
    assert said.value.decode() == f"block 7, warp 5, barrier {name}, parity 1"


def test_a_bounded_wait_passes_late_but_not_never():
    wait = emulated.library().bounded_wait
    assert wait(1, 10, 100) == 1, "what is open is not waited for"
    assert wait(8, 10, 100) == 8
    assert wait(1000, 10, 100) == 0, "it gives up"
    assert wait(2, 10**9, 100) == 2, "a thread that did not run for longer than its patience asks once more"


def test_every_plan_that_the_gate_forces_is_right():
    if not (ROOT / "bench").is_dir():
        pytest.skip("bench/ is not beside the tests")
    sys.path.insert(0, str(ROOT))
    gate = importlib.import_module("bench.gate.checks")
    for plan, shape in (*gate.TILES, *gate.CLUSTERS, *gate.ITEMS):
        check(mlp(*shape), plan)
    for plan, (M, K, N, r) in gate.LINEARS:
        check(linear(M, K, N, r), plan)
