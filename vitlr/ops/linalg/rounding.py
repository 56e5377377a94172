"""Rounding a weight to steps so that the loss moves least: every error is made up for by what is rounded after it.

The loss of an error E `[N, K]` is `tr(S E C Eᵀ)`, S `[N, N]` of the output side and C `[K, K]` of the inputs. With
`S = (1 + L_O) D_O (1 + L_O)ᵀ` and `C = (1 + L_I) D_I (1 + L_I)ᵀ`, L strictly lower, it is `Σ D_O,i D_I,j A_ij²` with
`A = (1 + L_O)ᵀ E (1 + L_I)`. Entry by entry from the last one backwards, `Ŵ_ij = Q(W_ij − what later errors ask of it)`
makes A the plain rounding errors: the loss of any steps is known before anything is rounded (docs/method.md). The idea
is that of YAQA (arXiv 2505.22988); S = 1 is GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitlr.errors import NumericalError
from vitlr.ops.dispatch import registry

OP = "round_to_steps"
VARIABLE = "VITLR_ROUNDING"
TILE = 64
LARGEST = 2**15 - 1  # of a code


@dataclass(frozen=True, eq=False)  # tensors have no single truth
class Side:
    """One side of the metric, `M = (1 + L) diag(D) (1 + L)ᵀ` in the order in which its entries are rounded."""

    order: Tensor
    """The entries, least variance first: they are rounded last to first, so the largest can be made up for longest."""
    L: Tensor
    D: Tensor

    @classmethod
    def of(cls, M: Tensor, damping: float) -> Side:
        """The side of `M + damping · mean of its diagonal`. Raises `NumericalError` where M is no moment."""
        order = M.diagonal().argsort(stable=True)
        M = M[order[:, None], order].double()
        level = M.diagonal().mean().clamp_min(torch.finfo(M.dtype).tiny)
        M.diagonal().add_(damping * level)
        R, failed = torch.linalg.cholesky_ex(M, upper=True)  # LAPACK writes columns: those of Rᵀ are rows of the root
        if int(failed) or not torch.isfinite(R.diagonal()).all():
            raise NumericalError("it is not positive definite, or holds NaN or Inf")
        R, root = R.mT, R.diagonal().clone()
        return cls(order, R.div_(root).tril_(-1), root.square())

    def by_entry(self, excess: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entry by entry unsorted: D, `D · diag(M⁻¹)`, by which errors vary once they are made up for, and the price.

        An error of unit variance in A, uncorrelated with the others, costs D in the side's own metric M, and in
        `M - excess` the price `D - diag((1 + L)⁻¹ excess (1 + L)⁻ᵀ)`; a number stands for that multiple of 1.
        """
        one = torch.eye(len(self.D), dtype=self.D.dtype, device=self.D.device)
        X = torch.linalg.solve_triangular(self.L, one, upper=False, unitriangular=True)
        E = excess.double()
        more = None if E.ndim == 0 else ((X @ E[self.order[:, None], self.order]) * X).sum(1)
        squares = X.square_()
        spread = self.D.reciprocal() @ squares * self.D
        more = E * squares.sum(1) if more is None else more
        back = self.order.argsort()
        return self.D[back], spread[back], (self.D - more).clamp_min(0)[back]


Bound = int | Tensor


def round_to_steps(
    W: Tensor, step: Tensor, rows: Side, columns: Side, largest: Bound = LARGEST, least: Bound | None = None
) -> tuple[Tensor, Tensor]:
    """Codes `[N, K]` of `W ≈ codes · step` and the errors A whose weighted squares are the loss.

    W and `step [N, K]` as the layer has them; `rows` is the output side, `columns` the input side. Codes lie between
    `least` and `largest`, whole numbers: one for all, one a column [K] or one each [N, K]; without `least` within
    `±largest`. Returns int16 codes in the layer's order and `A [N, K]` in fp64 in the order of the sides.
    VITLR_ROUNDING=torch|cpu chooses who rounds; VITLR_BACKEND does not reach this op.
    """
    bounds = _bounds(W, rows, columns, largest, least)
    within = (X[rows.order][:, columns.order].double() for X in (W, step))
    N, K = W.shape
    found, A = registry.select(OP, Key(N, K, W.device)).run(*within, rows.L, columns.L, bounds)
    codes = torch.empty(N, K, dtype=torch.int16, device=W.device)
    codes[rows.order[:, None], columns.order[None]] = found.to(torch.int16)
    return codes, A


def reference(
    W: Tensor, step: Tensor, rows: Side, columns: Side, largest: Bound = LARGEST, least: Bound | None = None
) -> tuple[Tensor, Tensor]:
    """`round_to_steps`, entry by entry as the formula says it."""
    N, K = W.shape
    low, high = _bounds(W, rows, columns, largest, least)
    W, step = W.double()[rows.order][:, columns.order], step.double()[rows.order][:, columns.order]
    E, A, codes = (torch.zeros(N, K, dtype=torch.float64) for _ in range(3))
    for i in range(N - 1, -1, -1):
        for j in range(K - 1, -1, -1):
            E[i, j] = 0.0
            asked = ((rows.L.mT @ E) + (E @ columns.L) + (rows.L.mT @ E @ columns.L))[i, j]
            codes[i, j] = ((W[i, j] - asked) / step[i, j]).round().clamp(low[i, j], high[i, j])
            E[i, j] = codes[i, j] * step[i, j] - W[i, j]
            A[i, j] = E[i, j] + asked
    found = torch.empty(N, K, dtype=torch.int16)
    found[rows.order[:, None], columns.order[None]] = codes.to(torch.int16)
    return found, A


def _bounds(W: Tensor, rows: Side, columns: Side, largest: Bound, least: Bound | None) -> tuple[Tensor, Tensor]:
    """The least and the largest codes in fp64, in the order of the sides."""

    def ordered(bound: Bound) -> Tensor:
        bound = torch.as_tensor(bound, dtype=torch.float64, device=W.device)
        if bound.ndim == 2:
            return bound[rows.order[:, None], columns.order]
        return bound.expand(W.shape[1])[columns.order].expand(W.shape)

    high = ordered(largest)
    return ordered(-torch.as_tensor(largest) if least is None else least), high


class Key(NamedTuple):
    """What dispatch knows of a call."""

    N: int
    K: int
    device: torch.device = torch.device("cpu")


def by_antidiagonals(
    W: Tensor, step: Tensor, L_O: Tensor, L_I: Tensor, bounds: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Codes and A in fp64, all in the order of the sides, in plain torch.

    Tiles on one antidiagonal do not depend on each other, nor do entries on one antidiagonal of a tile, so it takes
    about 2 (N + K) small steps whatever the size.
    """
    N, K = W.shape
    tiles = _Tiles(W, step, L_O, L_I, bounds)
    for diagonal in range(tiles.down + tiles.across - 2, -1, -1):
        tiles.solve(diagonal)
    return tiles.codes[:N, :K], tiles.A[:N, :K]


def roofline(key: Key, ceilings: registry.Ceilings | None = None) -> registry.Roofline:
    """What both sides ask, `N K (N + K)` FLOPs; the sides, W, steps, codes and A pass once, in fp64."""
    N, K = key.N, key.K
    return registry.Roofline.of(N * K * (N + K), 8 * (N * N + K * K + 4 * N * K), torch.float64, ceilings)


registry.register_op(
    OP,
    Key,
    roofline,
    registry.Candidate("torch", lambda key: None, by_antidiagonals, ran_on=("CPU",)),
    registry.Override(VARIABLE, "back-end", ("cpu", "torch")),
)


class _Tiles:
    """The matrices padded to whole tiles; `F = E (1 + L_I)`, so that `A = F + L_Oᵀ F`."""

    def __init__(self, W: Tensor, step: Tensor, L_O: Tensor, L_I: Tensor, bounds: tuple[Tensor, Tensor]) -> None:
        (N, K), b = W.shape, TILE
        self.down, self.across = -(-N // b), -(-K // b)
        below, beside = self.down * b - N, self.across * b - K
        pad = torch.nn.functional.pad
        self.W, self.step = pad(W, (0, beside, 0, below)), pad(step, (0, beside, 0, below), value=1.0)
        self.least, self.largest = (pad(bound, (0, beside, 0, below)) for bound in bounds)
        self.L_O, self.L_I = pad(L_O, (0, below, 0, below)), pad(L_I, (0, beside, 0, beside))
        self.E, self.F, self.A, self.codes = (torch.zeros_like(self.W) for _ in range(4))

    def solve(self, diagonal: int) -> None:
        """Round all tiles of one antidiagonal, when those below and to the right are done."""
        down = torch.arange(max(0, diagonal - self.across + 1), min(self.down - 1, diagonal) + 1)
        places = [(int(i), diagonal - int(i)) for i in down]
        W, step, least, largest, L_O, L_I = (
            torch.stack([_tile(X, *at) for at in where])
            for X, where in (
                (self.W, places),
                (self.step, places),
                (self.least, places),
                (self.largest, places),
                (self.L_O, [(i, i) for i, _ in places]),
                (self.L_I, [(j, j) for _, j in places]),
            )
        )
        by_row = torch.stack([self._by_row(i, j) for i, j in places])
        by_column = torch.stack([self._by_column(i, j) for i, j in places])
        E, F, A, codes = (torch.zeros_like(W) for _ in range(4))
        for d in range(2 * TILE - 2, -1, -1):
            i = torch.arange(max(0, d - TILE + 1), min(TILE - 1, d) + 1, device=W.device)
            j = d - i
            w, s, r, c = W[:, i, j], step[:, i, j], by_row[:, i, j], by_column[:, i, j]
            q = ((w - r - c) / s).round().clamp(least[:, i, j], largest[:, i, j])
            e = q * s - w
            f = e + r
            codes[:, i, j], E[:, i, j], F[:, i, j], A[:, i, j] = q, e, f, f + c
            by_row[:, i, :] += e[..., None] * L_I[:, j, :]
            by_column.mT[:, j, :] += f[..., None] * L_O[:, i, :]
        for found, X in ((E, self.E), (F, self.F), (A, self.A), (codes, self.codes)):
            for tile, at in zip(found, places, strict=True):
                _tile(X, *at).copy_(tile)

    def _by_row(self, i: int, j: int) -> Tensor:
        """What errors in the tiles to the right ask: `Σ_l E_il L_I,lj`."""
        a, b, end = i * TILE, j * TILE, (j + 1) * TILE
        return self.E[a : a + TILE, end:] @ self.L_I[end:, b:end]

    def _by_column(self, i: int, j: int) -> Tensor:
        """What those in the tiles below ask: `Σ_k L_O,ki F_kj`."""
        a, b, end = i * TILE, j * TILE, (i + 1) * TILE
        return self.L_O[end:, a:end].mT @ self.F[end:, b : b + TILE]


def _tile(X: Tensor, i: int, j: int) -> Tensor:
    return X[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
