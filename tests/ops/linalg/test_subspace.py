"""The solver made of products alone: what it loses against the optimum, on spectra that are known to hurt."""

from __future__ import annotations

import pytest
import spectra_cases
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitlr.errors import InputError
from vitlr.ops.linalg.eigh import BatchError
from vitlr.ops.linalg.subspace import RESOLUTION, STEPS, TORCH, Backend, _norm_bound, coefficients, leading_subspace

N = 192


def matrices(names=spectra_cases.CASES, n: int = N) -> torch.Tensor:
    K = torch.stack([W @ C @ W.mT for W, C in (spectra_cases.case(name, n) for name in names)])
    return (K + K.mT) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 16, 24, 48, 72])
def test_excess_loss(rank, dtype):
    """1e-10 of the optimal tail, and 1e-5 inside of a cluster: its members differ by 1e-4."""
    K = matrices().to(dtype)
    energies, U = leading_subspace(K, rank)
    assert U.dtype == torch.float64 and U.shape == (len(K), N, rank)
    torch.testing.assert_close(
        U.mT @ U, torch.eye(rank, dtype=torch.float64).expand(len(K), -1, -1), rtol=0, atol=1e-11
    )
    for i, name in enumerate(spectra_cases.CASES):
        assert spectra_cases.excess(K[i], U[i], rank) <= (1e-5 if name == "clustered" else 1e-10), name
        truth = torch.linalg.eigvalsh(K[i].double()).flip(0)[:rank]
        torch.testing.assert_close(energies[i], truth, rtol=1e-3 if name == "clustered" else 1e-7, atol=0)


def test_it_does_not_depend_on_the_size_of_the_numbers_or_on_the_batch():
    K = matrices(("mild", "outlier"))
    energies, _ = leading_subspace(K, 24)
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(leading_subspace(scale * K, 24)[0] / scale, energies, rtol=1e-8, atol=0)
    torch.testing.assert_close(leading_subspace(K[1:], 24)[0], energies[1:], rtol=1e-8, atol=0)


def test_a_rank_beyond_the_matrix_loses_nothing():
    X = torch.randn(1, 20, N, dtype=torch.float64)
    K = X.mT @ X
    for rank in (20, 40):
        energies, U = leading_subspace(K, rank)
        assert abs(float(K.diagonal(dim1=1, dim2=2).sum() - energies.sum())) <= 1e-9 * float(energies.sum())
        torch.testing.assert_close(U[0].mT @ U[0], torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10)
    energies, U = leading_subspace(torch.zeros(1, N, N), 8)
    assert not energies.any() and torch.isfinite(U).all()


def test_a_large_rank_is_an_ordinary_eigenproblem():
    K = matrices(("mild",))
    energies, U = leading_subspace(K, 100)
    torch.testing.assert_close(energies[0], torch.linalg.eigvalsh(K[0]).flip(0)[:100])
    assert spectra_cases.excess(K[0], U[0], 100) <= 1e-12


def counting(calls):
    """Torch's back-end; every call leaves its name, dtype and sizes [rows, inner, columns] (an eigh: nothing, n, n)."""

    def product(name):
        def call(A, B):
            calls.append((name, A.dtype, A.shape[0] * A.shape[-2], A.shape[-1], B.shape[-1]))
            return getattr(TORCH, name)(A, B)

        return call

    def eigh(H):
        calls.append(("eigh", H.dtype, 0, H.shape[-1], H.shape[-1]))
        return TORCH.eigh(H)

    return Backend(product("matmul"), product("symmetric"), eigh)


def test_only_products_and_small_eigenproblems_come_from_the_backend():
    calls: list = []
    K, rank = matrices(("mild",)), 24
    backend = counting(calls)
    with FlopCounterMode(display=False) as counter:
        leading_subspace(K, rank, backend=backend)
    assert counter.get_total_flops() == sum(2 * rows * inner * columns for *_, rows, inner, columns in calls)
    large = [call for call in calls if call[0] == "symmetric"]
    # One evaluation of the sign function, as the guess of σ from Ritz values is good, and two for the norm's bound.
    assert len(large) == 3 * STEPS + 2
    assert {dtype for _, dtype, *_ in large} == {torch.float32}
    assert max(n for name, *_, n in calls if name == "eigh") == rank + 16
    calls.clear()
    leading_subspace(K, rank, backend=backend, iterate=torch.float64)
    assert {dtype for name, dtype, *_ in calls if name == "symmetric"} == {torch.float64}


def test_the_sign_iteration():
    """Together the steps are sign to 1e-3 from the resolution on, and grow below."""
    x = torch.logspace(-7, 0, 400, dtype=torch.float64)
    y = x.clone()
    for a, b, c in coefficients(RESOLUTION, STEPS):
        y = a * y + b * y**3 + c * y**5
    assert (y[x >= RESOLUTION] - 1).abs().max() <= 1e-3
    assert (y > 0).all() and (y[x <= RESOLUTION] <= 1 + 1e-3).all()


def test_a_flat_spectrum():
    """Nothing converges by itself there, and Ritz values are far below the eigenvalues."""
    U = spectra_cases.orthogonal(N, torch.Generator().manual_seed(0))
    for low, high in ((0.0, 1.0), (1.0, 1.3)):
        K = (U * torch.linspace(low, high, N, dtype=torch.float64)) @ U.mT
        for rank in (1, 8, 30):
            _, V = leading_subspace(K[None], rank)
            assert spectra_cases.excess(K, V[0], rank) <= 1e-10


def test_the_norm_is_never_underestimated():
    """Beyond a norm of 1 the sign iteration diverges, so the scale may not come from a guess."""
    for energies in (torch.ones(50), torch.linspace(0, 1, 50), torch.eye(50)[0]):
        U = spectra_cases.orthogonal(50, torch.Generator().manual_seed(0)).float()
        bound = float(_norm_bound(((U * energies) @ U.mT)[None], TORCH))
        assert 1 - 1e-5 <= bound <= 50**0.125 * (1 + 1e-5)


def test_fast_math_and_autocast_do_not_reach_it():
    K = matrices(("outlier",))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            energies, _ = leading_subspace(K, 24)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(energies, leading_subspace(K, 24)[0], rtol=1e-12, atol=0)


def test_nan_and_inf_name_the_matrix():
    for poison in (float("nan"), float("inf")):
        K = matrices(("mild", "outlier"))
        K[1, 3, 4] = poison
        with pytest.raises(BatchError, match="matrix 1 of the batch: it holds NaN or Inf"):
            leading_subspace(K, 8)


@pytest.mark.parametrize(("shape", "rank"), [((5, 5), 1), ((1, 5, 4), 1), ((1, 5, 5), 0), ((1, 5, 5), 6)])
def test_bad_input(shape, rank):
    with pytest.raises(InputError, match="expected"):
        leading_subspace(torch.ones(shape), rank)
