"""Rounding with feedback: the loss is the sum that the mathematics says, and smaller than without feedback."""

from __future__ import annotations

import pytest
import torch

from vitlr.errors import NumericalError
from vitlr.ops.backends import native
from vitlr.ops.linalg.rounding import Side, reference, round_to_steps


def moment(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(4 * n, n, generator=generator, dtype=torch.float64) @ torch.randn(
        n, n, generator=generator, dtype=torch.float64
    )
    return mixed.mT @ mixed / (4 * n)


def case(N: int, K: int, damping: float = 0.05):
    generator = torch.Generator().manual_seed(N + K)
    W = torch.randn(N, K, generator=generator, dtype=torch.float64)
    step = 0.2 + torch.rand(N, K, generator=generator, dtype=torch.float64)
    return W, step, Side.of(moment(N, 1), damping), Side.of(moment(K, 2), damping)


def loss(E: torch.Tensor, rows: Side, columns: Side) -> float:
    """`tr(S E C Eᵀ)` with S and C multiplied out of their sides."""

    def whole(side: Side) -> torch.Tensor:
        root = (torch.eye(len(side.D), dtype=torch.float64) + side.L) * side.D.sqrt()
        M = torch.empty(len(side.D), len(side.D), dtype=torch.float64)
        M[side.order[:, None], side.order[None]] = root @ root.mT
        return M

    return float((whole(rows) @ E @ whole(columns) @ E.mT).trace())


@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 7), (64, 3), (65, 20), (130, 70), (64, 64)])
def test_the_loss_is_the_weighted_sum_of_plain_rounding_errors(N, K):
    W, step, rows, columns = case(N, K)
    codes, A = round_to_steps(W, step, rows, columns)
    assert loss(codes * step - W, rows, columns) == pytest.approx(float((rows.D[:, None] * columns.D * A**2).sum()))
    assert (A.abs() <= step[rows.order][:, columns.order] / 2 * (1 + 1e-9)).all()


@pytest.mark.parametrize(("N", "K"), [(5, 7), (20, 33), (40, 12)])
def test_tiles_give_what_the_formula_says_entry_by_entry(N, K, monkeypatch):
    monkeypatch.setattr("vitlr.ops.linalg.rounding.TILE", 8)
    W, step, rows, columns = case(N, K)
    (codes, A), (expected, errors) = round_to_steps(W, step, rows, columns), reference(W, step, rows, columns)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(A, errors, rtol=1e-9, atol=1e-9)


def test_feedback_on_both_sides_loses_least():
    W, step, rows, columns = case(96, 72)
    plain = Side(rows.order, torch.zeros_like(rows.L), rows.D)
    found = {
        "two": round_to_steps(W, step, rows, columns)[0],
        "one": round_to_steps(W, step, plain, columns)[0],
        "nearest": (W / step).round(),
    }
    two, one, nearest = (loss(codes * step - W, rows, columns) for codes in found.values())
    assert two < 0.8 * one and one < 0.8 * nearest


def test_without_correlations_it_rounds_to_nearest():
    W, step, *_ = case(20, 30)
    codes, _ = round_to_steps(W, step, *(Side.of(torch.eye(n, dtype=torch.float64), 0.1) for n in W.shape))
    assert torch.equal(codes, (W / step).round().to(torch.int16))


def test_codes_stay_within_the_largest_and_what_is_cut_off_is_made_up_for():
    W, step, rows, columns = case(24, 16)
    codes, A = round_to_steps(W, step / 8, rows, columns, 7)
    assert int(codes.abs().max()) == 7
    E = codes * step / 8 - W
    assert loss(E, rows, columns) == pytest.approx(float((rows.D[:, None] * columns.D * A**2).sum()))
    cut = (W / step * 8).round().clamp(-7, 7) * step / 8 - W
    assert loss(E, rows, columns) < loss(cut, rows, columns)


@pytest.mark.parametrize("who", ["torch", "cpu"])
def test_each_entry_may_have_bounds_of_its_own(who, monkeypatch):
    if who == "cpu" and not native.available():
        pytest.skip(f"native extension: {native.why_not()}")
    monkeypatch.setenv("VITLR_ROUNDING", who)
    W, step, rows, columns = case(21, 70)
    least = -torch.arange(21 * 70).remainder(3).view(21, 70).double()
    codes, A = round_to_steps(W, step, rows, columns, least + 3, least)
    assert ((codes >= least) & (codes <= least + 3)).all() and codes.unique().tolist() == [-2, -1, 0, 1, 2, 3]
    expected, errors = reference(W, step, rows, columns, least + 3, least)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(A, errors, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not native.available(), reason=f"native extension: {native.why_not()}")
@pytest.mark.parametrize(("N", "K"), [(1, 1), (64, 64), (63, 129), (200, 65)])
def test_tiles_in_cpp_give_the_codes_of_those_in_torch(N, K, monkeypatch):
    W, step, rows, columns = case(N, K)
    largest = torch.arange(K).remainder(5) + 1
    found = {}
    for who in ("torch", "cpu"):
        monkeypatch.setenv("VITLR_ROUNDING", who)
        found[who] = round_to_steps(W.float(), step.float(), rows, columns, largest)
    assert torch.equal(found["cpu"][0], found["torch"][0])
    torch.testing.assert_close(found["cpu"][1], found["torch"][1], rtol=1e-9, atol=1e-9)


def test_a_singular_moment_is_damped_and_no_moment_is_refused():
    x = torch.randn(1, 12, dtype=torch.float64)
    side = Side.of(x.mT @ x, 0.1)
    assert torch.isfinite(side.L).all() and (side.D > 0).all()
    assert torch.isfinite(Side.of(torch.zeros(4, 4), 0.1).D).all()
    for wrong in (torch.full((3, 3), float("nan")), -torch.eye(3)):
        with pytest.raises(NumericalError, match="not positive definite, or holds NaN or Inf"):
            Side.of(wrong, 0.1)


@pytest.mark.parametrize("as_matrix", [False, True])
def test_an_error_costs_its_price_in_a_metric_that_is_less_damped(as_matrix):
    M = moment(9, 3).double()
    excess = torch.tensor(0.3 * float(torch.linalg.eigvalsh(M)[0]), dtype=torch.float64)
    side = Side.of(M, 0.0)
    _, _, price = side.by_entry(excess * torch.eye(9, dtype=torch.float64) if as_matrix else excess)
    less = (M - excess * torch.eye(9, dtype=torch.float64))[side.order][:, side.order]
    X = torch.linalg.inv(torch.eye(9, dtype=torch.float64) + side.L)
    torch.testing.assert_close(price[side.order], (X @ less @ X.mT).diagonal())
