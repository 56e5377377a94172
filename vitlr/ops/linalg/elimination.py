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
# The cheapest at its start, among which a block chooses: as all would, at 3072 neurons (docs/method.md).
CANDIDATES = 4 * BLOCK


class Elimination:
    """Neurons removed one by one, each time the cheapest with the others making up for it.

    `covariance [D, D]` is Σ, positive definite; `G [N, D] = R W` with `F = Rᵀ R`; both float64. O(D³), most of it in
    matrix products. Raises `NumericalError` where Σ is not positive definite.
    """

    def __init__(self, covariance: Tensor, G: Tensor) -> None:
        self._P = _inverse(covariance, "hidden neurons")
        self._rows = G.mT.clone(memory_format=torch.contiguous_format)  # [D, N]: a neuron is a row
        self._alive = torch.arange(len(G.mT), device=G.device)
        self._gone: list[Tensor] = []
        self._added: list[Tensor] = []

    @property
    def alive(self) -> Tensor:
        """The neurons that are left, in no order."""
        return self._alive

    @property
    def rows(self) -> Tensor:
        """`(R V)ᵀ`, the weights on them, a row each; to be used before more of them go."""
        return self._rows

    @property
    def order(self) -> Tensor:
        """Those that are gone, the last one first: with all gone, `order[:h]` is kept at width h."""
        return torch.cat(self._gone).flip(0)

    @property
    def added(self) -> Tensor:
        """What each of these adds to the outputs `R W h` beside those before it, `[gone, N]`.

        Over the neurons kept at width h, `Σ_j added_j added_jᵀ = R V Σ_kk Vᵀ Rᵀ`.
        """
        return torch.cat(self._added).flip(0)

    @property
    def errors(self) -> Tensor:
        """The loss of every width up to the number of those gone, `errors[h] = Σ_{j ≥ h} ‖added_j‖²`."""
        lost = torch.cat(self._added).square().sum(1).cumsum(0).flip(0)
        return torch.cat([lost, lost.new_zeros(1)])

    def down_to(self, width: int) -> None:
        """Remove neurons until only so many are left."""
        while len(self._alive) > width:
            self._remove(_cheapest(self._P, self._rows, min(BLOCK, len(self._alive) - width)))

    def _remove(self, gone: Tensor) -> None:
        """A block at once: with `P_gg = L Lᵀ` and `U = P_:g L⁻ᵀ`, `P ← P − U Uᵀ` and `rows ← rows − U L⁻¹ rows_g`."""
        P, rows = self._P, self._rows
        L = torch.linalg.cholesky(P[gone[:, None], gone])
        added = torch.linalg.solve_triangular(L, rows[gone], upper=False)
        U = torch.linalg.solve_triangular(L, P[gone], upper=False).mT
        self._gone.append(self._alive[gone])
        self._added.append(added)
        # In place: what stays of the last ones moves to where others went, and the rest is a view.
        left = len(P) - len(gone)
        last = torch.ones(len(gone), dtype=torch.bool, device=P.device)
        last[gone[gone >= left] - left] = False
        holes, movers = gone[gone < left], last.nonzero()[:, 0] + left
        for matrix in (P, rows, U, self._alive):
            matrix[holes] = matrix[movers]
        P[:, holes] = P[:, movers]
        U = U[:left]
        self._P = P[:left, :left].addmm_(U, U.mT, alpha=-1)
        self._rows = rows[:left].addmm_(U, added, alpha=-1)
        self._alive = self._alive[:left]


def eliminate(covariance: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """The order `[D]` in which all neurons go, the last to go first, and the loss of every width, `errors [D + 1]`.

    `errors[h] = min_V tr(F (W − V E_k) Σ (W − V E_k)ᵀ)` for `k = order[:h]`, `errors[D] = 0` (see `Elimination`).
    """
    going = Elimination(covariance, G)
    going.down_to(0)
    return going.order, going.errors


def _inverse(covariance: Tensor, what: str) -> Tensor:
    """Σ⁻¹; `NumericalError` where there is none."""
    L, info = torch.linalg.cholesky_ex(covariance)
    if int(info) or not torch.isfinite(L).all():
        raise NumericalError(f"the moment of the {what} is not positive definite, or holds NaN or Inf")
    return torch.cholesky_inverse(L)


def _cheapest(P: Tensor, rows: Tensor, size: int) -> Tensor:
    """The next `size` to go, in order, among the `CANDIDATES` that are cheapest now.

    With `H = rows rowsᵀ` a removal changes `H ← H − a sᵀ − s aᵀ + a_j s sᵀ`, a its column j and `s = P_:j / P_jj`: only
    columns of the candidates' P and H are brought up to date.
    """
    score = torch.linalg.vector_norm(rows, dim=1).square_() / P.diagonal()
    among = score.topk(min(CANDIDATES, len(P)), largest=False).indices.sort().values
    P, rows = P[among[:, None], among], rows[among]
    H = rows @ rows.mT
    U, S, A = (P.new_zeros(len(P), size) for _ in range(3))
    pivots = P.new_zeros(size)
    diagonal, weight = P.diagonal().clone(), H.diagonal().clone()
    gone = torch.empty(size, dtype=torch.int64, device=P.device)
    for t in range(size):
        j = int((weight / diagonal).argmin())
        gone[t] = j
        p = P[j] - U[:, :t] @ U[j, :t]
        a = H[j] - A[:, :t] @ S[j, :t] - S[:, :t] @ (A[j, :t] - pivots[:t] * S[j, :t])
        s = p / p[j]
        weight += s * (a[j] * s - 2 * a)
        diagonal -= p * s
        U[:, t], S[:, t], A[:, t], pivots[t] = p / p[j].sqrt(), s, a, a[j]
        weight[gone[: t + 1]], diagonal[gone[: t + 1]] = float("inf"), 1.0
    return among[gone]


def eliminate_groups(covariance: Tensor, G: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """As `eliminate`, for groups of `size` neighbours (the heads of an attention) that go together.

    With g the group and P_gg its block, removing it costs `tr(F V_g P_gg⁻¹ V_gᵀ)`, and `V ← V − V_g P_gg⁻¹ P_g:`,
    `P ← P − P_:g P_gg⁻¹ P_g:`. `errors` between two whole numbers of groups are those of the lower one.
    """
    P, V = _inverse(covariance, "channels"), G
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
