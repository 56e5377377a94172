"""The native Gram kernel, each instruction set that this CPU runs, against fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tolerance import assert_close_to

from vitlr.errors import InputError
from vitlr.ops.backends import native
from vitlr.ops.linalg.gram import reference
from vitlr.ops.linalg.triangles import square, triangle

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native extension: {native.why_not()}")

SHAPES = [(1, 1), (1, 16), (63, 17), (197, 33), (127, 48), (128, 96), (129, 97), (1000, 130), (700, 203), (20, 801)]


@pytest.fixture(params=["portable", "avx2", "avx512", "amx_int8"])
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv("VITLR_CPU_ISA", request.param)
    try:
        assert native.build_info()["isa_used"] == request.param
    except InputError as reason:
        pytest.skip(str(reason))
    return request.param


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def exact(C, X, weight=None):
    x = X.double()
    return C + (x if weight is None else x * weight.double()[:, None]).mT @ x


def symmetric(n):
    C = torch.randn(n, n, dtype=torch.float64)
    return C + C.mT


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("T", "n"), SHAPES)
def test_values(isa, threads, T, n, weighted):
    X, C = torch.randn(T, n), symmetric(n)
    weight = torch.rand(T) if weighted else None
    truth, plain = exact(C, X, weight), C.clone()
    reference(plain, X, weight)
    native.gram(C, X, weight)
    assert_close_to(C, plain, truth)
    assert torch.equal(C, C.mT)


def test_several_groups_of_blocks(isa):
    """More rows than are packed at once: 1 MiB are 512 rows at n = 512."""
    X, C = torch.randn(2100, 512), torch.zeros(512, 512, dtype=torch.float64)
    plain = torch.zeros_like(C)
    reference(plain, X)
    native.gram(C, X, None)
    assert_close_to(C, plain, exact(torch.zeros_like(C), X))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("T", "n"), [*SHAPES, (300, 500), (2100, 400)])
def test_a_triangle_gets_what_the_square_gets(isa, threads, T, n, weighted):
    X, C = torch.randn(T, n), symmetric(n)
    weight = torch.rand(T) if weighted else None
    half = triangle(C)
    native.gram(C, X, weight)
    native.gram(half, X, weight)
    torch.testing.assert_close(square(half), C, rtol=1e-13, atol=1e-13 * float(C.abs().max()))


def test_columns_of_any_size_and_spread_keep_six_figures(isa):
    """Digits share a column's step: a huge entry leaves the others fewer, and must itself outweigh what they lose."""
    X = torch.nn.functional.gelu(torch.randn(1000, 160)) * torch.logspace(-12, 12, 160)
    X[7, ::3] *= 300
    X[:, 5] = 0
    X[:, 9] = 2 * X[:, 8]
    C = torch.zeros(160, 160, dtype=torch.float64)
    native.gram(C, X, None)
    truth = exact(torch.zeros_like(C), X)
    scale = truth.diagonal().sqrt()
    error = (C - truth).abs() / (scale[:, None] * scale[None]).clamp_min(1e-300)
    assert error.max() < (1e-5 if isa == "amx_int8" else 2e-6) and error.square().mean().sqrt() < 4e-7
    assert not C[5].any() and not C[:, 5].any()


def test_entries_at_the_ends_of_fp32_stay_finite(isa):
    for size in (1e-44, 1e-38, 1e-25, 1e18):
        X, C = torch.randn(100, 80) * size, torch.zeros(80, 80, dtype=torch.float64)
        native.gram(C, X, None)
        assert torch.isfinite(C).all() and torch.equal(C, C.mT)


def test_strides(isa):
    X = torch.randn(300, 50)
    whole = torch.zeros(50, 50, dtype=torch.float64)
    native.gram(whole, X, None)
    layouts = {
        "transposed": X.mT.contiguous().mT,
        "every second column": torch.stack([X, torch.full_like(X, torch.nan)], 2).flatten(1)[:, ::2],
        "rows apart": torch.cat([X, torch.full_like(X, torch.nan)], 1)[:, :50],
    }
    for name, x in layouts.items():
        C = torch.zeros_like(whole)
        native.gram(C, x, None)
        assert torch.equal(C, whole), name


def test_expanded_rows(isa):
    row = torch.randn(1, 40)
    C = torch.zeros(40, 40, dtype=torch.float64)
    native.gram(C, row.expand(500, 40), None)
    torch.testing.assert_close(C, 500 * row.double().mT @ row.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("T", "n"), [(67, 35), (67, 99)])
def test_nothing_outside_is_read_or_written(isa, T, n):
    guarded = torch.full((n * n + 128,), torch.nan, dtype=torch.float64)
    C = guarded[64:-64].view(n, n).zero_()
    memory = torch.full((T * n + 256,), torch.nan)
    X = memory[128:-128].view(T, n).normal_()
    native.gram(C, X, None)
    assert torch.isfinite(C).all()
    assert guarded[:64].isnan().all() and guarded[-64:].isnan().all()


def test_threads_do_not_change_the_result(isa):
    """The triangle is cut differently, but every entry is summed by one thread, in the order of the rows."""
    X, results = torch.randn(3000, 200), []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(torch.zeros(200, 200, dtype=torch.float64))
            native.gram(results[-1], X, None)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_accumulates_in_fp64(isa):
    """A small update on a large sum survives, as it would not in fp32."""
    C = torch.full((8, 8), 2.0**40, dtype=torch.float64)
    for _ in range(3):
        native.gram(C, torch.full((2, 8), 0.5), None)
    assert torch.equal(C, torch.full((8, 8), 2.0**40 + 1.5, dtype=torch.float64))


def test_nan_and_inf_reach_their_rows_and_columns_only(isa):
    X = torch.randn(40, 37)
    X[3, 5] = torch.nan
    C = torch.zeros(37, 37, dtype=torch.float64)
    native.gram(C, X, None)
    bad = torch.zeros(37, 37, dtype=torch.bool)
    bad[5], bad[:, 5] = True, True
    assert torch.equal(C.isnan(), bad)


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "none"])
def test_unknown_instruction_set_is_refused(monkeypatch, name):
    monkeypatch.setenv("VITLR_CPU_ISA", name)
    with pytest.raises(InputError, match=f"VITLR_CPU_ISA={name} .*portable"):
        native.gram(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(3, 2), None)
    with pytest.raises(InputError, match="VITLR_CPU_ISA"):
        native.build_info()


def test_shares_the_thread_pool_of_torch():
    """Two OpenMP runtimes would spin against each other."""
    if not native.build_info()["openmp"]:
        pytest.skip("built without OpenMP")
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("no /proc/self/maps here")
    loaded = {Path(line.split()[-1]) for line in maps.read_text().splitlines() if "libgomp.so" in line}
    assert len(loaded) <= 1, loaded


def test_says_why_an_instruction_set_is_used(monkeypatch):
    monkeypatch.delenv("VITLR_CPU_ISA", raising=False)
    built, best = native.build_info()["isa_compiled"], native.best_isa()
    why = native.build_info()["isa_why"]
    assert (why == "the best that was built, and this CPU runs it") == (best == built[-1])
    assert all(isa in why for isa in built[built.index(best) + 1 :])
    monkeypatch.setattr(native, "best_isa", lambda: "portable")
    assert native.build_info()["isa_why"] == f"this CPU does not run {', '.join(built[1:])}" or len(built) == 1
    monkeypatch.setenv("VITLR_CPU_ISA", "portable")
    assert native.build_info()["isa_why"] == "VITLR_CPU_ISA asks for it"
