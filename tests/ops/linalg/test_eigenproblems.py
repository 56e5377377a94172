"""The solver: pairs of moments one by one and in batches, in fp64 and in fp32 with sweeps over the tail."""

from __future__ import annotations

import pytest
import spectra_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitlr.errors import InputError
from vitlr.ops.linalg.batched_solve import damped_cholesky
from vitlr.ops.linalg.eigenproblems import solve, solve_batch
from vitlr.ops.linalg.eigh import BatchError

N = 96


def moment(n: int, rows: int, seed: int) -> torch.Tensor:
    X = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return X.mT @ X


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), rank=st.integers(0, 12), seed=st.integers(0, 2**31))
def test_solve_returns_an_inverse_pair_and_sorted_energies(n, rank, seed):
    F = moment(n, 2 * n, seed) + 1e-3 * torch.eye(n, dtype=torch.float64)
    energies, P, Q = solve(moment(n, min(rank, n), seed + 1), F)
    torch.testing.assert_close(Q @ P, torch.eye(n, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert (energies.diff() <= 0).all() and (energies >= 0).all()


def loss(M, F, P, Q, r):
    """`‖F^{1/2} (1 − P_r Q_r) M^{1/2}‖²`"""
    D = torch.eye(len(M), dtype=M.dtype) - P[:, :r] @ Q[:r]
    return float(((D.mT @ (D if F is None else F @ D)) * M).sum())


@pytest.mark.parametrize("with_F", [False, True])
def test_a_batch_is_solved_like_its_members(with_F):
    M = torch.stack([moment(12, rows, rows) for rows in (40, 5, 12)])
    F = torch.stack([moment(12, 30, seed) for seed in (1, 2, 3)]) if with_F else None
    energies, P, Q = solve_batch(M, F)
    for i in range(3):
        f = None if F is None else F[i]
        one = solve(M[i], f)
        torch.testing.assert_close(energies[i], one[0], rtol=1e-9, atol=1e-9 * float(one[0][0]))
        torch.testing.assert_close(Q[i] @ P[i], torch.eye(12, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        for r in (1, 4, 9):
            least = float(one[0][r:].sum())
            assert loss(M[i], f, P[i], Q[i], r) == pytest.approx(least, rel=1e-8, abs=1e-10 * float(one[0].sum()))


def test_only_the_members_that_need_it_get_more_jitter(monkeypatch):
    noisy = moment(8, 3, 0) - 3e-7 * torch.eye(8, dtype=torch.float64)  # fp32 noise below zero in empty directions
    F = torch.stack([moment(8, 20, 1), noisy, moment(8, 20, 2)])
    sizes, factor = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda A: (sizes.append(len(A)), factor(A))[1])
    L = damped_cholesky(F)
    assert sizes[0] == 3 and len(sizes) > 1 and set(sizes[1:]) == {1}
    level = float(noisy.trace()) / 8
    torch.testing.assert_close(L @ L.mT, F, rtol=0, atol=1e-5 * level)
    monkeypatch.undo()
    for i in range(3):
        assert torch.equal(L[i], damped_cholesky(F[i : i + 1])[0])


def test_what_is_not_semidefinite_is_named():
    F = torch.stack([moment(5, 9, 0), -torch.eye(5, dtype=torch.float64)])
    with pytest.raises(
        BatchError, match="matrix 1 of the batch: its gradient moment is not positive semidefinite"
    ) as e:
        solve_batch(F, F)
    assert e.value.index == 1
    with pytest.raises(torch.linalg.LinAlgError, match="not positive semidefinite"):
        solve(F[0], F[1])


def test_bad_input_and_an_empty_batch():
    M = moment(4, 8, 0)[None]
    with pytest.raises(InputError, match="precision='fp16', expected"):
        solve_batch(M, precision="fp16")
    with pytest.raises(InputError, match=r"M is \[4, 4\]"):
        solve_batch(M[0])
    with pytest.raises(InputError, match=r"F \[1, 3, 3\]"):
        solve_batch(M, M[:, :3, :3])
    energies, P, Q = solve_batch(M[:0])
    assert energies.shape == (0, 4) and P.shape == Q.shape == (0, 4, 4)


def allowed(energies: torch.Tensor, r: int) -> float:
    """What the fp32 path may lose of the optimal loss: most where the tail is far below the largest eigenvalue."""
    return 9e-7 if energies[r] >= 1e-4 * energies[0] else 4e-5


@pytest.mark.parametrize("weighted", [False, True], ids=["M", "F and M"])
def test_fp32_with_sweeps_keeps_to_its_bounds(weighted):
    names = spectra_cases.CASES
    pairs = [spectra_cases.case(name, N) for name in names]
    if weighted:  # Lᵀ M L with M = C and F = Wᵀ W
        M, F = torch.stack([C for _, C in pairs]), torch.stack([W.mT @ W for W, _ in pairs])
    else:
        M, F = torch.stack([W @ C @ W.mT for W, C in pairs]), None
    solutions = {p: solve_batch(M, F, precision=p) for p in ("fp64", "fp32")}
    single = solve_batch(M.float().double(), F, eigensolver=lambda K: fp32(K))
    worst = 0.0
    for i, name in enumerate(names):
        energies = solutions["fp64"][0][i]
        f = None if F is None else F[i]
        for r in (N // 8, N // 4, N // 2, 3 * N // 4):
            tail = float(energies[r:].sum())
            if tail < 1e-9 * float(energies[0]):  # rank-deficient: nothing is lost from there on
                continue
            lost = loss(M[i], f, *(x[i] for x in solutions["fp32"][1:]), r) / tail - 1
            assert -1e-6 < lost <= allowed(energies, r), (name, r, lost)
            assert float(solutions["fp32"][0][i, r:].sum()) == pytest.approx(tail, rel=1e-3)
            worst = max(worst, loss(M[i], f, *(x[i] for x in single[1:]), r) / tail - 1)
        torch.testing.assert_close(
            solutions["fp32"][2][i] @ solutions["fp32"][1][i], torch.eye(N, dtype=torch.float64), rtol=0, atol=1e-9
        )
    assert worst > 1e-3, "one solve in fp32 is not enough: these cases are hard"


def fp32(K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    energies, U = torch.linalg.eigh(K.float())
    return energies.double(), U.double()


def test_fp32_takes_moments_of_any_size():
    M = moment(20, 40, 0)
    for scale in (1e-60, 1.0, 1e60):
        energies, P, _ = solve_batch(scale * M[None], precision="fp32")
        torch.testing.assert_close(energies[0] / scale, solve(M)[0], rtol=1e-5, atol=1e-5)
        assert torch.isfinite(P).all()
    energies, P, _ = solve_batch(torch.zeros(1, 4, 4, dtype=torch.float64), precision="fp32")
    assert not energies.any() and torch.isfinite(P).all()
