"""The kernels of the batched solve, run thread by thread on the host: values, schedules, races, bad conditioning."""

from __future__ import annotations

import pytest
import solve_emulation as emulation
import spectra_cases
import torch
from solve_emulation import fields, library, numbers

F64 = torch.float64
PANEL = 64
WIDE = pytest.mark.parametrize("wide", [False, True], ids=["64", "128"])
MODES = {"in order": 0, "late copies": 1, "backwards": 2, "late and backwards": 3}


def poisoned(*shape: int) -> torch.Tensor:
    """What nobody writes shows as NaN."""
    return torch.full(shape, float("nan"), dtype=F64)


def multiply(X, Y, wide=None, mode=0, symmetric=False, upper_X=False, lower_Y=False, upper_Y=False, out=None):
    (b, M, K), N = X.shape, Y.shape[-1]
    out = poisoned(b, M, N) if out is None else out
    flags = (symmetric, upper_X, lower_Y, upper_Y)
    emulation.call("weighted_chain", fields(X), fields(Y), fields(out), b, M, N, K, *flags, wide=wide, mode=mode)
    return out


def bound(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """What the rounding of sums in fp64 explains, whatever their order."""
    return X.shape[-1] * 2e-16 * (X.abs() @ Y.abs()) + 1e-300


@WIDE
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 70, 133, 37), (1, 200, 129, 64), (2, 64, 64, 16), (1, 3, 260, 15)])
def test_products_of_ragged_shapes(shape, wide):
    b, M, N, K = shape
    X, Y = torch.randn(b, M, K, dtype=F64), torch.randn(b, K, N, dtype=F64)
    assert ((multiply(X, Y, wide) - X @ Y).abs() <= bound(X, Y)).all()


@WIDE
def test_strides_of_any_kind(wide):
    X, Y = torch.randn(2, 70, 45, dtype=F64), torch.randn(2, 45, 90, dtype=F64)
    plain = multiply(X, Y, wide)
    nan = float("nan")
    spread = torch.full((2, 140, 90), nan, dtype=F64)
    spread[:, ::2, ::2] = X
    room = poisoned(2, 90, 70)
    for x, y in ((X.mT.contiguous().mT, Y), (X, Y.mT.contiguous().mT), (spread[:, ::2, ::2], Y)):
        assert torch.equal(multiply(x, y, wide), plain)
    assert torch.equal(multiply(X, Y, wide, out=room.mT), plain) and not room.isnan().any()
    assert torch.equal(multiply(X[:1].expand(2, -1, -1), Y[:1].expand(2, -1, -1), wide)[1], plain[0])


@WIDE
@pytest.mark.parametrize("n", [1, 63, 64, 65, 130, 200])
def test_a_symmetric_result_is_exactly_symmetric(n, wide):
    W, C = torch.randn(2, n, 50, dtype=F64), torch.randn(2, 50, 50, dtype=F64)
    C = C + C.mT
    P = multiply(W, C, wide)
    Y = multiply(P, W.mT, wide, symmetric=True)
    assert torch.equal(Y, Y.mT)
    assert ((Y - W @ C @ W.mT).abs() <= 2 * bound(W.abs() @ C.abs(), W.mT)).all()


@WIDE
@pytest.mark.parametrize("n", [5, 64, 150, 260])
def test_zeros_of_triangles_are_passed_over(n, wide):
    """And nothing else: beyond the tiles that hold the triangle there is NaN, which any read would show."""
    L, M = torch.randn(1, n, n, dtype=F64).tril(), torch.randn(1, n, n, dtype=F64)
    tile = 128 if wide else 64
    block = torch.arange(n) // tile
    hidden = torch.where((block[:, None] >= block[None, :]), L, torch.tensor(float("nan"), dtype=F64))
    for found, X, Y in (
        (multiply(hidden.mT, M, wide, upper_X=True), L.mT, M),
        (multiply(M, hidden, wide, lower_Y=True), M, L),
        (multiply(M, hidden.mT, wide, upper_Y=True), M, L.mT),
    ):
        assert ((found - X @ Y).abs() <= bound(X, Y)).all()


@pytest.mark.parametrize("late", [1, 2, 3])
@WIDE
def test_no_race_shows(wide, late):
    """The order of threads between barriers and the time at which copies arrive must not matter."""
    X, Y = torch.randn(1, 150, 130, dtype=F64), torch.randn(1, 130, 140, dtype=F64)
    assert torch.equal(multiply(X, Y, wide, mode=late), multiply(X, Y, wide))


@WIDE
@pytest.mark.parametrize(("M", "N"), [(1, 1), (64, 64), (65, 300), (768, 768), (1000, 130)])
def test_every_entry_has_one_tile(M, N, wide):
    nothing = (0, 0, 0, 0)
    for symmetric in (False, True):
        N = M if symmetric else N
        count = torch.zeros(M, N, dtype=torch.int32)
        given = numbers(nothing, nothing, nothing, 1, M, N, 16, symmetric, 0, 0, 0)
        library().coverage(given, int(wide), emulation.ctypes.c_void_p(count.data_ptr()))
        expected = torch.ones(M, N, dtype=torch.int32)
        if symmetric:  # entries above the diagonal come from the tiles below it; a tile on it holds both
            tile = torch.arange(M) // (128 if wide else 64)
            expected = (tile[:, None] >= tile[None, :]).int()
        assert torch.equal(count, expected)


def test_a_third_of_the_work_of_a_symmetric_chain_is_left_out_and_more_by_triangles():
    """What the docs say of n = 768: multiply-adds as a share of those of the plain product."""

    def share(*flags):
        given = numbers((0,) * 12, 1, 768, 768, 768, *flags)
        count = torch.zeros(768, 768, dtype=torch.int32)
        return library().coverage(given, 1, emulation.ctypes.c_void_p(count.data_ptr()))

    assert share(0, 0, 0, 0) == 1.0
    assert share(1, 0, 0, 0) == pytest.approx(21 / 36)
    assert share(0, 1, 0, 0) == share(0, 0, 0, 1) == pytest.approx(21 / 36)
    assert share(1, 0, 1, 0) == pytest.approx(sum(k * k for k in range(1, 7)) / 216)


def test_small_batches_get_small_tiles():
    def wide(batch, n, symmetric=0):
        return library().prefers_wide(
            numbers((0,) * 12, batch, n, n, n, symmetric, 0, 0, 0), emulation.ctypes.c_int64(132)
        )

    assert wide(48, 768) and wide(48, 768, 1) and not wide(4, 192) and not wide(1, 768)


def test_fragments_meet_no_bank_twice():
    assert library().bank_conflicts() == 1


def factor(F: torch.Tensor, jitter: float = 0.0, mode: int = 0):
    b, n, _ = F.shape
    L, inverse = poisoned(b, n, n), poisoned(b, -(-n // PANEL), PANEL, PANEL)
    shift, info = torch.full((b,), jitter, dtype=F64), torch.zeros(b, dtype=torch.int32)
    pointers = (inverse.data_ptr(), shift.data_ptr(), info.data_ptr())
    emulation.call("cholesky", fields(F), fields(L), *pointers, b, n, mode=mode)
    return L, inverse, info


def definite(n: int, decades: float, b: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    Q = torch.stack([spectra_cases.orthogonal(n, g) for _ in range(b)])
    return (Q * torch.logspace(0, -decades, n, dtype=F64)) @ Q.mT


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 128, 150, 200])
def test_cholesky(n):
    F = definite(n, 3)
    L, inverse, info = factor(F.tril() + torch.full_like(F, float("nan")).triu(1), 1e-3)
    exact = torch.linalg.cholesky(F + 1e-3 * torch.eye(n, dtype=F64))
    assert not info.any() and not L.triu(1).any()
    torch.testing.assert_close(L, exact, rtol=1e-11, atol=1e-14)
    for panel in range(inverse.shape[1]):
        block = torch.eye(PANEL, dtype=F64).repeat(2, 1, 1)
        part = exact[:, panel * PANEL :, panel * PANEL :][:, :PANEL, :PANEL]
        size = part.shape[-1]
        block[:, :size, :size] = part
        one = inverse[:, panel] @ block
        torch.testing.assert_close(one, torch.eye(PANEL, dtype=F64).expand_as(one), rtol=0, atol=1e-11)


@pytest.mark.parametrize("decades", [8, 12, 14])
def test_ill_conditioned_moments_are_factored_and_solved_as_by_lapack(decades):
    n = 200
    F, one = definite(n, decades), torch.eye(n, dtype=F64)
    jitter = 1e-12 * float(F.diagonal(dim1=-2, dim2=-1).mean())  # as the solver adds at least
    L, inverse, info = factor(F, jitter)
    exact = torch.linalg.cholesky(F + jitter * one)
    assert not info.any()

    def residual(L, P, U):  # backward error of L and of L⁻ᵀ U
        backward = (L.mT @ P - U).abs().amax((1, 2)) / (L.abs().amax((1, 2)) * P.abs().amax((1, 2)))
        return (L @ L.mT - F - jitter * one).abs().max(), backward.max()

    U = torch.linalg.qr(torch.randn(2, n, n, dtype=F64)).Q
    P = poisoned(2, n, n).mT
    emulation.call("back_substitution", fields(L), fields(U), fields(P), inverse.data_ptr(), 2, n, n)
    lapack = torch.linalg.solve_triangular(exact.mT, U, upper=True)
    for ours, theirs in zip(residual(L, P, U), residual(exact, lapack, U), strict=True):
        assert ours <= 4 * theirs + n * 1e-17


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_factors_and_solutions_show_no_race(mode):
    F, U = definite(150, 6), torch.randn(2, 150, 70, dtype=F64)
    results = []
    for m in (0, mode):
        L, inverse, _ = factor(F, mode=m)
        P = poisoned(2, 150, 70)
        emulation.call("back_substitution", fields(L), fields(U), fields(P), inverse.data_ptr(), 2, 150, 70, mode=m)
        results.append((L, inverse, P))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_not_definite_is_told_with_its_column():
    F = definite(150, 2, b=5)
    F[4, 130, 130] = float("inf")
    F[1, 100, 100] = -1.0
    F[2] = -F[2]
    F[3, 70, 3] = F[3, 3, 70] = float("nan")
    L, _, info = factor(F)
    assert info.tolist() == [0, 101, 1, 71, 131]
    assert torch.isfinite(L[0]).all() and torch.isfinite(L[2]).all()


def test_the_last_panel_has_any_width():
    for n in (65, 100, 127):
        F, U = definite(n, 2, b=1), torch.randn(1, n, 3, dtype=F64)
        L, inverse, _ = factor(F)
        P = poisoned(1, n, 3)
        emulation.call("back_substitution", fields(L), fields(U), fields(P), inverse.data_ptr(), 1, n, 3)
        torch.testing.assert_close(L.mT @ P, U, rtol=1e-9, atol=1e-9)
