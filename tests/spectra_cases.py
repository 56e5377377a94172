"""Synthetic second moments whose spectra are known to hurt: for tests of everything that solves for subspaces.

Every case is a pair (W [m, k], C [k, k]) in fp64 with K = W C Wᵀ [m, m] the matrix to be solved.
"""

from __future__ import annotations

import torch
from torch import Tensor

CASES = ("mild", "outlier", "ill-conditioned", "rank-deficient", "clustered")


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [n, n]."""
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def case(name: str, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W and C [n, n] of the case of that name.

    mild: white weights, inputs whose variances decay over two decades, in directions of their own.
    outlier: the same, with n / 100 channels of the input (not directions) 30 times larger, as in trained ViTs.
    ill-conditioned: inputs whose variances decay over eight decades, and weights over two.
    rank-deficient: mild, from n / 2 tokens only.
    clustered: half the variances are 1 and half 0.9, both up to 1e-4: no rank within either half is well-defined.
    """
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5
    turn = orthogonal(n, g)
    decades = {"ill-conditioned": 8.0, "outlier": 4.0}.get(name, 2.0)
    variances = torch.logspace(0, -decades, n, dtype=torch.float64)
    if name == "clustered":
        variances = torch.ones(n, dtype=torch.float64)
        variances[n // 2 :] = 0.9
        variances *= 1 + 1e-4 * torch.rand(n, generator=g, dtype=torch.float64)
        return orthogonal(n, g), (turn * variances) @ turn.mT
    if name == "ill-conditioned":
        W = orthogonal(n, g) * torch.logspace(0, -1, n, dtype=torch.float64) @ orthogonal(n, g)
    if name == "rank-deficient":
        X = torch.randn(n // 2, n, generator=g, dtype=torch.float64) @ ((turn * variances.sqrt()) @ turn.mT)
        return W, X.mT @ X / len(X)
    C = (turn * variances) @ turn.mT
    if name == "outlier":
        scale = torch.ones(n, dtype=torch.float64)
        scale[torch.randperm(n, generator=g)[: max(n // 100, 2)]] = 100.0
        C = scale[:, None] * C * scale
    elif name not in CASES:
        raise ValueError(f"unknown case {name!r}, expected one of {', '.join(CASES)}")
    return W, C


def excess(K: Tensor, U: Tensor, rank: int) -> float:
    """What projecting on the first columns of U [n, >= rank] loses over the optimum, relative to the optimum; fp64.

    `(Σ_{i<r} λ_i − tr Uᵀ K U) / Σ_{i≥r} λ_i`; U's columns are made orthonormal first.
    """
    K, U = K.double(), torch.linalg.qr(U[:, :rank].double())[0]
    energies = torch.linalg.eigvalsh(K).flip(0)
    return float((energies[:rank].sum() - (U * (K @ U)).sum()) / energies[rank:].clamp_min(0).sum())
