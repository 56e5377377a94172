"""Products of two factors: the same product, better conditioned."""

from __future__ import annotations

import torch
from torch import Tensor


def balance(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite a product so that both factors carry the root of its singular values: `A B = (U √Σ)(√Σ Vᵀ)`."""
    Qa, Ra = torch.linalg.qr(A)
    Qb, Rb = torch.linalg.qr(B.mT)
    U, sigma, Vh = torch.linalg.svd(Ra @ Rb.mT)
    root = sigma.sqrt()
    return Qa @ (U * root), (root[:, None] * Vh) @ Qb.mT
