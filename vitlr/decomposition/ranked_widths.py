"""The spectra of a second linear at many of its widths, from one elimination, which has the weights of all of them.

With V the weights on what is kept and `F = Rᵀ R`, what its ranks cost are the eigenvalues of `R V M_kk Vᵀ Rᵀ`. With Σ
for M that product is a sum over the neurons kept, of what each adds (`Elimination.added`), and M is a ridge and two
vectors away from Σ (`HiddenMoments.about_mean`): no width forms a moment of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from vitlr.decomposition.hidden_moments import HiddenMoments
from vitlr.decomposition.spectra import tails
from vitlr.ops.linalg.elimination import Elimination

FACTORED = 16  # so many widths are offered with ranks as well: each takes eigenvalues of its second linear


def spread(widths: Sequence[int]) -> list[int]:
    """Those of the widths offered that come with ranks as well: evenly spread, with the first and the last."""
    return [widths[round(i)] for i in np.linspace(0, len(widths) - 1, min(FACTORED, len(widths)))]


def eliminate_ranked(
    moments: HiddenMoments, G: Tensor, widths: Collection[int]
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """The order and the loss of every width (see `eliminate`), and the loss of every rank at these widths.

    `G [N, D] = R W`. Raises `NumericalError` where the moments are none.
    """
    covariance = moments.covariance()
    ridge = moments.ridge / (1 + moments.ridge) * covariance.diagonal().mean()
    U, S = moments.about_mean if moments.with_bias else (G.new_zeros(len(covariance), 0), G.new_zeros(0, 0))
    going = Elimination(covariance, G)
    del covariance
    apart: dict[int, Tensor] = {}  # R V (M − Σ)_kk Vᵀ Rᵀ
    for width in sorted(widths, reverse=True):
        going.down_to(width)
        seen = going.rows.mT @ U[going.alive]
        apart[width] = (seen @ S @ seen.mT).addmm_(going.rows.mT, going.rows, alpha=-float(ridge))
    going.down_to(0)
    added, K, before = going.added, G.new_zeros(len(G), len(G)), 0
    found: dict[int, Tensor] = {}
    for width in sorted(widths):
        K.addmm_(added[before:width].mT, added[before:width])
        energies = torch.linalg.eigvalsh(K + apart.pop(width)).flip(0).clamp_min(0)
        found[width], before = tails(energies), width
    return going.order, going.errors, found
