"""Backward elimination against least squares on the tokens themselves, in float64."""

import pytest
import torch
from torch import Tensor

from vitlr.errors import NumericalError
from vitlr.ops.linalg import elimination
from vitlr.ops.linalg.elimination import Elimination, compensate, eliminate, eliminate_alone


def case(D: int, N: int = 5, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated tokens H [T, D], weights W [N, D] and a root R [N, N] of the metric."""
    H = torch.randn(tokens, D, dtype=torch.float64) @ torch.randn(D, D, dtype=torch.float64)
    return H, torch.randn(N, D, dtype=torch.float64), torch.randn(N, N, dtype=torch.float64)


def least(H: Tensor, W: Tensor, R: Tensor, keep: Tensor) -> float:
    """The least `Σ ‖R (W h − V h_k)‖²` by lstsq on the tokens."""
    target = H @ W.mT
    V = torch.linalg.lstsq(H[:, keep], target).solution
    return float(((target - H[:, keep] @ V) @ R.mT).square().sum())


@pytest.mark.parametrize("D", [7, 64, 65, 150, 300])  # below, at and above the block of removals; with candidates
def test_losses_of_all_widths_are_those_of_least_squares(D):
    H, W, R = case(D)
    order, errors = eliminate(H.mT @ H, R @ W)
    assert sorted(order.tolist()) == list(range(D)) and errors.shape == (D + 1,) and errors[D] == 0
    assert (errors[:-1] >= errors[1:]).all()
    for width in {1, D // 3, D // 2, D - 1}:
        expected = least(H, W, R, order[:width])
        assert float(errors[width]) == pytest.approx(expected, rel=1e-8)
    assert float(errors[0]) == pytest.approx(float((H @ W.mT @ R.mT).square().sum()), rel=1e-8)


def test_every_step_takes_the_cheapest_neuron():
    H, W, R = case(9)
    order, _ = eliminate(H.mT @ H, R @ W)
    for width in range(8, 0, -1):
        tries = {int(j): least(H, W, R, order[: width + 1][order[: width + 1] != j]) for j in order[: width + 1]}
        assert min(tries, key=tries.get) == int(order[width])


def test_the_cheapest_are_found_among_candidates(monkeypatch):
    monkeypatch.setattr(elimination, "BLOCK", 16)
    H = torch.randn(400, 40, dtype=torch.float64) @ torch.randn(40, 300, dtype=torch.float64)
    H += torch.randn(400, 300, dtype=torch.float64)
    H, W = H * torch.rand(300).exp(), torch.randn(5, 300, dtype=torch.float64)
    R = torch.randn(5, 5, dtype=torch.float64)
    found = []
    for candidates in (300, 64):
        monkeypatch.setattr(elimination, "CANDIDATES", candidates)
        found.append(eliminate(H.mT @ H, R @ W))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-9, atol=0)


def test_weights_and_what_neurons_add_are_known_on_the_way_down():
    H, W, R = case(150)
    M, G = H.mT @ H, R @ W
    going = Elimination(M, G)
    going.down_to(90)
    keep, weights = going.alive.clone(), going.rows.mT.clone()
    assert torch.allclose(weights, R @ compensate(W, M, keep), rtol=1e-8, atol=1e-8)
    going.down_to(0)
    assert set(going.order[:90].tolist()) == set(keep.tolist())
    left = going.added[:90]
    assert torch.allclose(left.mT @ left, weights @ M[keep][:, keep] @ weights.mT, rtol=1e-8)
    assert torch.equal(M, H.mT @ H) and torch.equal(G, R @ W), "what was given was written over"


def test_copies_cost_nothing():
    H, W, R = case(6)
    H = torch.cat([H, H[:, :3]], 1)
    W = torch.cat([W, W[:, :3]], 1)
    M = H.mT @ H
    order, errors = eliminate(M + 1e-9 * M.diagonal().mean() * torch.eye(9), R @ W)
    assert float(errors[6]) < 1e-6 * float(errors[0])
    assert len({int(j) % 6 for j in order[:6]}) == 6
    _, lost = eliminate_alone(M, R @ W)
    assert float(lost[6]) > 1e-3 * float(lost[0])


def test_without_compensation_the_loss_is_that_of_dropped_columns():
    H, W, R = case(40)
    order, errors = eliminate_alone(H.mT @ H, R @ W)
    for width in (1, 13, 39):
        gone = order[width:]
        assert float(errors[width]) == pytest.approx(
            float((H[:, gone] @ W[:, gone].mT @ R.mT).square().sum()), rel=1e-9
        )
    _, better = eliminate(H.mT @ H, R @ W)
    assert (better <= errors * (1 + 1e-9) + 1e-9).all()


def test_compensated_weights_are_ridge_regression():
    H, W, _ = case(12)
    keep, ridge = torch.tensor([0, 3, 4, 9]), 0.7
    V = compensate(W, H.mT @ H + ridge * torch.eye(12), keep)
    # The same as least squares on the tokens and one more token √ridge e_j for every neuron j.
    more = torch.cat([H, ridge**0.5 * torch.eye(12, dtype=torch.float64)])
    expected = torch.linalg.lstsq(more[:, keep], more @ W.mT).solution.mT
    assert torch.allclose(V, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_moment_that_is_none_is_an_error(bad):
    M = torch.eye(4, dtype=torch.float64)
    M[2, 2] = bad
    with pytest.raises(NumericalError, match="positive definite"):
        eliminate(M, torch.randn(3, 4, dtype=torch.float64))
