"""Products of two factors: the same product, better conditioned."""

from __future__ import annotations

import torch
from torch import Tensor

_APART = 1e6  # the largest row against the smallest one: from there on they are kept to their own precision


def balance(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite a product so that both factors carry the root of its singular values: `A B = (U √Σ)(√Σ Vᵀ)`."""
    Qa, Ra = torch.linalg.qr(A)
    Qb, Rb = torch.linalg.qr(B.mT)
    U, sigma, Vh = torch.linalg.svd(Ra @ Rb.mT)
    root = sigma.sqrt()
    return _times(A, Qa, Ra, U * root), _times(B.mT, Qb, Rb, Vh.mT * root).mT


def _times(A: Tensor, Q: Tensor, R: Tensor, T: Tensor) -> Tensor:
    """`Q T` for `A = Q R`; where rows of A are far apart, as `A (R⁻¹ T)`: Q knows its rows to the largest one only."""
    sizes, pivots = A.norm(dim=1), R.diagonal().abs()
    sizes = sizes[sizes > 0]
    if not len(sizes) or sizes.amax() < _APART * sizes.amin() or pivots.amin() * _APART < pivots.amax():
        return Q @ T
    return A @ torch.linalg.solve_triangular(R, T, upper=True)
