"""Backward elimination: which neurons go first, what each width costs, what makes up for them. Knows matrices only.

A layer reads `h [D]` through `W [N, D]`, and an error δ of its output costs `δᵀ F δ`. Keeping the set k of neurons with
the best weights V on it costs `tr(F (W − V E_k) Σ (W − V E_k)ᵀ)`, Σ the moment of h and E_k the rows k of the identity.
With `V = W Σ_{:,k} Σ_kk⁻¹` what is lost is uncorrelated with what is kept, so losses of removals one after the other
add up: with `P = Σ_kk⁻¹` of the neurons still there, taking out j costs `v_jᵀ F v_j / P_jj`, and changes
`V ← V − v_j P_j: / P_jj` and `P ← P − P_:j P_j: / P_jj` (Optimal Brain Surgeon, Hassibi and Stork 1993, by columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitlr.errors import NumericalError

BLOCK = 64  # removals between two updates of the whole matrices


def eliminate(covariance: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Remove neurons one by one, each time the cheapest with the others making up for it.

    `covariance [D, D]` is Σ, positive definite; `G [N, D] = R W` with `F = Rᵀ R`; both float64. Returns the order
    `[D]`, the last to go first, so that `order[:h]` is kept at width h, and the loss of every width, `errors [D + 1]`:
    `errors[h] = min_V tr(F (W − V E_k) Σ (W − V E_k)ᵀ)`, `errors[D] = 0`. O(D³) with most of it in matrix products.
    Raises `NumericalError` where Σ is not positive definite.
    """
    L, info = torch.linalg.cholesky_ex(covariance)
    if int(info) or not (torch.isfinite(covariance).all() and torch.isfinite(G).all()):
        raise NumericalError("the moment of the hidden neurons is not positive definite, or holds NaN or Inf")
    P = torch.cholesky_inverse(L)
    rows = G.mT.contiguous()  # [D, N]: a neuron is a row
    alive = torch.arange(len(P), device=P.device)
    removed: list[Tensor] = []
    costs: list[Tensor] = []
    while len(alive):
        gone, cost, P, rows = _block(P, rows, min(BLOCK, len(alive)))
        removed.append(alive[gone])
        costs.append(cost)
        stays = torch.ones(len(alive), dtype=torch.bool, device=P.device)
        stays[gone] = False
        alive = alive[stays]
    order = torch.cat(removed).flip(0)
    errors = torch.cat(costs).clamp_min(0).cumsum(0).flip(0)
    return order, torch.cat([errors, errors.new_zeros(1)])


def _block(P: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`size` removals: indices and costs in order, and P [n, n] and rows [n, N] of what stays.

    Within the block both are `P − U Uᵀ` and `rows − V Tᵀ`: a removal then reads one column of each, not all of them.
    """
    n = len(P)
    U, V, T = P.new_zeros(n, size), P.new_zeros(n, size), rows.new_zeros(rows.shape[1], size)
    diagonal = P.diagonal().clone()
    weight = rows.square().sum(1)  # v_jᵀ F v_j
    gone, cost = torch.empty(size, dtype=torch.int64, device=P.device), P.new_empty(size)
    for t in range(size):
        score = weight / diagonal
        j = int(score.argmin())
        gone[t], cost[t] = j, score[j]
        column = P[j] - U[:, :t] @ U[j, :t]
        own = rows[j] - T[:, :t] @ V[j, :t]
        share = column / column[j]
        across = rows @ own - V[:, :t] @ (T[:, :t].mT @ own)
        weight = weight - 2 * across * share + own.square().sum() * share.square()
        diagonal = diagonal - column * share
        U[:, t], V[:, t], T[:, t] = column / column[j].sqrt(), share, own
        weight[gone[: t + 1]], diagonal[gone[: t + 1]] = float("inf"), 1.0
    stays = torch.ones(n, dtype=torch.bool, device=P.device)
    stays[gone] = False
    U, V = U[stays], V[stays]
    P = P[stays][:, stays]
    return gone, cost, P.addmm_(U, U.mT, alpha=-1), rows[stays].addmm_(V, T.mT, alpha=-1)


def eliminate_groups(covariance: Tensor, G: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """As `eliminate`, for groups of `size` neighbours (the heads of an attention) that go together.

    With g the group and P_gg its block, removing it costs `tr(F V_g P_gg⁻¹ V_gᵀ)`, and `V ← V − V_g P_gg⁻¹ P_g:`,
    `P ← P − P_:g P_gg⁻¹ P_g:`. `errors` between two whole numbers of groups are those of the lower one.
    """
    L, info = torch.linalg.cholesky_ex(covariance)
    if int(info) or not (torch.isfinite(covariance).all() and torch.isfinite(G).all()):
        raise NumericalError("the moment of the channels is not positive definite, or holds NaN or Inf")
    P, V = torch.cholesky_inverse(L), G
    alive = torch.arange(len(P), device=P.device).view(-1, size)
    removed, costs = [], []
    while len(alive):
        blocks = [slice(i * size, (i + 1) * size) for i in range(len(alive))]
        lost = torch.stack([(V[:, b] @ torch.linalg.solve(P[b, b], V[:, b].mT)).trace() for b in blocks])
        g = int(lost.argmin())
        share = torch.linalg.solve(P[blocks[g], blocks[g]], P[blocks[g]])
        V, P = V - V[:, blocks[g]] @ share, P - P[:, blocks[g]] @ share
        removed.append(alive[g])
        costs.append(lost[g])
        left = torch.cat([alive[:g], alive[g + 1 :]])
        stays = torch.ones(len(P), dtype=torch.bool, device=P.device)
        stays[blocks[g]] = False
        P, V, alive = P[stays][:, stays], V[:, stays], left
    errors = torch.stack(costs).clamp_min(0).cumsum(0).flip(0)
    return torch.cat(removed[::-1]), _spread(errors, size)


def _spread(errors: Tensor, size: int) -> Tensor:
    """Losses of 0, 1, … groups as those of every width, `[D + 1]`."""
    return torch.cat([errors.repeat_interleave(size), errors.new_zeros(1)])


def eliminate_alone(moment: Tensor, G: Tensor, size: int = 1) -> tuple[Tensor, Tensor]:
    """The same with the other weights left as they are: order and errors of dropping columns of W.

    `errors[h] = tr(F W_r M_rr W_rᵀ)` for the set r that is gone, M the moment about zero. Groups of `size` neighbours
    go together.
    """
    B = (G.mT @ G) * moment  # [D, D]; the loss of a set is the sum of its entries of B
    B = B.unflatten(1, (-1, size)).unflatten(0, (-1, size)).sum((1, 3))
    score = B.diagonal().clone()
    order = torch.empty(len(B), dtype=torch.int64, device=B.device)
    errors = B.new_zeros(len(B) + 1)
    for left in range(len(B) - 1, -1, -1):
        j = int(score.argmin())
        order[left], errors[left] = j, errors[left + 1] + score[j]
        score += 2 * B[j]
        score[order[left:]] = float("inf")
    channels = (order[:, None] * size + torch.arange(size, device=order.device)).flatten()
    return channels, _spread(errors[:-1].clamp_min(0), size)


def compensate(W: Tensor, covariance: Tensor, keep: Tensor) -> Tensor:
    """`V = W Σ_{:,k} Σ_kk⁻¹ [N, h]`: the weights on the kept neurons that come closest to W [N, D]."""
    L = torch.linalg.cholesky(covariance[keep][:, keep])
    return torch.cholesky_solve((W @ covariance[:, keep]).mT, L).mT
