"""Low rank and a compact residual together: `W ≈ A B + R`, R quantised or block-diagonal, solved in float64.

The error is measured as `‖S^½ (W - A B - R) C^½‖²_F`: C = Σ x xᵀ says how large the inputs are, S = Σ g gᵀ how much
each output matters; what is not known stands for the identity. Both halves are easy alone: A B is the best rank-r
matrix for W - R (an eigenproblem), R is W - A B in codes, or a least-squares fit of the blocks. So they take turns,
from two starts (A B fitted first, or R), and the best pair that turned up is returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vitlr.errors import InputError, NumericalError
from vitlr.ops.layers.codes import LARGEST, dequantise, encode, rounded, spread
from vitlr.ops.linalg.eigenproblems import solve
from vitlr.ops.linalg.factors import balance

ROUNDS = 4  # turns from each start; the error changes by less than a percent afterwards
# Clipping an outlier may cost less than a coarser grid for its whole group: the scales that are tried, of the largest.
_SHRINKS = {"int8": (40, 8), "int4": (24, 12), "fp8": (16, 8)}  # form: (steps to zero, steps tried)
_CONDITION = 1e-9  # of C's mean eigenvalue: below is rounding of the sums in C


@dataclass(frozen=True, eq=False)  # tensors have no single truth
class Parts:
    """A [N, r], B [r, K], codes and scale of R as `vitlr.ops.layers.codes` lays them out, and the squared error."""

    A: Tensor
    B: Tensor
    codes: Tensor
    scale: Tensor | None
    error: float


@dataclass(frozen=True, eq=False)
class Metric:
    """C [K, K] with C^½, and S [N, N]; None for what is not known."""

    C: Tensor | None = None
    root: Tensor | None = None
    S: Tensor | None = None

    def error(self, E: Tensor) -> float:
        """`‖S^½ E C^½‖²_F` of E [N, K]."""
        X = E if self.root is None else E @ self.root
        return float((X * (X if self.S is None else self.S @ X)).sum())


def lowrank(V: Tensor, rank: int, by: Metric) -> tuple[Tensor, Tensor]:
    """The A [N, r], B [r, K] that minimise `‖S^½ (V - A B) C^½‖`: A B = Π V, Π onto the leading directions of V C Vᵀ.

    No inverse of C is needed, which may be singular. The smaller side is solved.
    """
    X = V if by.root is None else V @ by.root
    if by.S is not None or X.shape[0] <= X.shape[1]:
        _, P, Q = solve(X @ X.mT, by.S)
        return balance(P[:, :rank], Q[:rank] @ V)
    _, Z = torch.linalg.eigh(X.mT @ X)
    U = torch.linalg.qr(X @ Z[:, -rank:])[0]
    return balance(U, U.mT @ V)


def quantise(
    V: Tensor, form: str, group_size: int, dtype: torch.dtype, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales [N, groups] of V [N, K], rounded to nearest; every group takes the best of a few scales.

    `weight` [K]: how much an error in each column costs. Scales are rounded to `dtype` before the codes are found.
    """
    K = V.shape[1]
    fill = (0, -K % group_size)
    cells = torch.nn.functional.pad(V, fill).unflatten(1, (-1, group_size))  # [N, groups, group_size]
    weights = torch.nn.functional.pad(V.new_ones(K) if weight is None else weight, fill).unflatten(0, (-1, group_size))
    largest = cells.abs().amax(-1, keepdim=True) / LARGEST[form]
    best = torch.full_like(largest, torch.inf)
    scale = torch.ones_like(largest)
    steps, tries = _SHRINKS[form]
    for step in range(tries):
        tried = (largest * (1 - step / steps)).to(dtype).clamp_min(torch.finfo(dtype).tiny).to(V.dtype)
        error = ((cells - rounded(cells / tried, form) * tried).square() * weights).sum(-1, keepdim=True)
        scale, best = torch.where(error < best, tried, scale), torch.minimum(error, best)
    scale = scale.squeeze(-1)
    return encode(V / spread(scale, group_size, K), form), scale.to(dtype)


def fit_blocks(V: Tensor, columns: int, by: Metric) -> Tensor:
    """The blocks D [nb, N/nb, columns] on the diagonal that minimise `‖(V - D) C^½‖`; without C, those of V."""
    K = V.shape[1]
    blocks = K // columns
    index = torch.arange(blocks, device=V.device)
    if by.C is None:
        return V.unflatten(1, (blocks, columns)).unflatten(0, (blocks, -1))[index, :, index]
    # Rows of block b: D C[b, b] = (V C)[:, b], a small problem each.
    C = by.C + _CONDITION * by.C.trace() / K * torch.eye(K, dtype=V.dtype, device=V.device)
    within = C.unflatten(1, (blocks, columns)).unflatten(0, (blocks, columns))[index, :, index]
    seen = (V @ C).unflatten(1, (blocks, columns)).unflatten(0, (blocks, -1))[index, :, index]
    return torch.linalg.solve(within, seen.mT).mT


class Measured(Protocol):
    """What the solve asks of a layer's statistics, `vitlr.calibration.statistics.LayerStatistics`."""

    name: str
    in_features: int
    out_features: int

    def metric(self, W: Tensor) -> Metric:
        """What they say about errors of the layer, whose weight is W [N, K]."""


def solve_parts(
    W: Tensor,
    rank: int,
    form: str,
    group_size: int,
    dtype: torch.dtype,
    statistics: Measured | None = None,
    rounds: int = ROUNDS,
) -> Parts:
    """`W ≈ A B + R` with the parts rounded to `dtype`; never worse, by the statistics, than what they do not know of.

    Raises InputError where the statistics are of another shape, NumericalError for NaN or Inf.
    """
    N, K = W.shape
    if statistics is not None and (statistics.out_features, statistics.in_features) != (N, K):
        shape = f"{statistics.out_features}x{statistics.in_features}"
        raise InputError(f"the statistics of {statistics.name} are of a layer {shape}, the weight is {N}x{K}")
    if not torch.isfinite(W).all():
        raise NumericalError(f"weight {list(W.shape)} holds NaN or Inf: no factors of it")
    W = W.detach().double()
    try:
        by = Metric() if statistics is None else statistics.metric(W)
        found = [_alternate(W, rank, form, group_size, dtype, Metric(), by, rounds)]
        if statistics is not None:
            found.append(_alternate(W, rank, form, group_size, dtype, by, by, rounds))
    except torch.linalg.LinAlgError as cause:
        raise NumericalError(f"weight {list(W.shape)}: the solve failed ({cause})") from cause
    return min(found, key=lambda parts: parts.error)


def _alternate(
    W: Tensor, rank: int, form: str, group_size: int, dtype: torch.dtype, by: Metric, judge: Metric, rounds: int
) -> Parts:
    """The best by `judge` of the pairs that turns of the two problems by `by` lead to."""
    weight = None if by.C is None else by.C.diagonal()
    best: Parts | None = None

    def keep(A: Tensor, B: Tensor, codes: Tensor, scale: Tensor | None, R: Tensor) -> None:
        nonlocal best
        A, B = A.to(dtype), B.to(dtype)
        error = judge.error(W - A.double() @ B.double() - R)
        if best is None or error < best.error:
            best = Parts(A, B, codes, scale, error)

    nothing = (W.new_zeros(len(W), rank), W.new_zeros(rank, W.shape[1]))
    for A, B in (lowrank(W, rank, by), nothing):
        for _ in range(rounds):
            V = W - A.to(dtype).double() @ B.to(dtype).double()
            if form == "blockdiag":
                codes, scale = fit_blocks(V, group_size, by).to(dtype), None
                R = dequantise(codes, None, form, group_size, W.shape[1]).double()
            else:
                codes, scale = quantise(V, form, group_size, dtype, weight)
                R = dequantise(codes, scale.double(), form, group_size, W.shape[1])
            keep(A, B, codes, scale, R)
            A, B = lowrank(W - R, rank, by)
            keep(A, B, codes, scale, R)
    assert best is not None
    return best
