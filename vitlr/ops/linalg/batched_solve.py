"""The activation-weighted solve of a batch: pairs of moments in, energies and projectors of every rank out.

`min ‖F^{1/2} (1 − P_r Q_r) M^{1/2}‖_F²` for all r: with `F = L Lᵀ`, `Lᵀ M L = U Λ Uᵀ` and `P = L⁻ᵀ U`, `Q = Uᵀ Lᵀ` the
first r columns of P and rows of Q are the answer, at a loss of `Σ_{i≥r} λ_i`. Without F, L is the identity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.linalg.eigh import BatchError, eigh
from vitlr.ops.linalg.weighted_gram_chain import weighted_gram_chain

OP = "batched_solve"
JITTERS = [10.0**k for k in range(-12, -2)]  # relative to the mean eigenvalue; the first that suffices is taken

Solution = tuple[Tensor, Tensor, Tensor]


class Key(NamedTuple):
    """What dispatch knows of a call; `weighted`: with F."""

    b: int
    n: int
    weighted: bool = True
    dtype: torch.dtype = torch.float64
    device: torch.device = torch.device("cpu")


def batched_solve(M: Tensor, F: Tensor | None = None) -> Solution:
    """M, F [b, n, n] fp64, symmetric positive semidefinite -> energies [b, n] descending and ≥ 0, P and Q [b, n, n].

    M may be singular; F gets the least jitter that helps. Not differentiable. Raises `BatchError`, whose `index` says
    which matrix, where F is not semidefinite or the eigensolver does not converge; InputError for what does not fit.
    """
    check(M, F)
    if not M.numel():
        return M.new_empty(M.shape[:2]), M.clone(), M.clone()
    key = Key(len(M), M.shape[-1], F is not None, M.dtype, M.device)
    return registry.select(OP, key).run(M.detach(), None if F is None else F.detach())


def check(M: Tensor, F: Tensor | None) -> None:
    """Raise InputError for moments that are no batch of pairs."""
    if M.dim() != 3 or M.shape[1] != M.shape[2] or (F is not None and F.shape != M.shape):
        shape = None if F is None else list(F.shape)
        raise InputError(f"M is {list(M.shape)} and F {shape}, expected [b, n, n] for both")
    if M.dtype not in (torch.float32, torch.float64) or M.layout != torch.strided:
        raise InputError(f"M is {M.dtype} of layout {M.layout}, expected dense matrices in fp32 or fp64")
    if F is not None and (F.dtype != M.dtype or F.layout != M.layout or F.device != M.device):
        raise InputError(f"F is {F.dtype} on {F.device}, M is {M.dtype} on {M.device}")


def reference(M: Tensor, F: Tensor | None = None) -> Solution:
    """The specification, in plain torch; each step with the candidate that is preferred for it."""
    L = None if F is None else damped_cholesky(F)
    energies, U = eigh(M if L is None else weighted_gram_chain(L.mT, M))
    return back_transform(L, energies, U)


def back_transform(L: Tensor | None, energies: Tensor, U: Tensor) -> Solution:
    """Energies [b, n] ascending and vectors U [b, n, n] of `Lᵀ M L` to energies descending, P and Q."""
    energies, U = energies.flip(-1).clamp_min(0), U.flip(-1)
    if L is None:
        return energies, U, U.mT
    return energies, torch.linalg.solve_triangular(L.mT, U, upper=True), U.mT @ L.mT


def damped_cholesky(F: Tensor) -> Tensor:
    """Factors `F = L Lᵀ` of matrices `[b, n, n]` semidefinite up to rounding, each with the least jitter that helps.

    Moments of float32 products carry noise of either sign, 1e-7 of the largest eigenvalue, in the directions that a
    rank-deficient weight leaves empty. Raises `BatchError` where a matrix is further from semidefinite.
    """
    one = torch.eye(F.shape[-1], dtype=F.dtype, device=F.device)
    level = mean_eigenvalue(F)[:, None, None]
    L, info = torch.linalg.cholesky_ex(F + JITTERS[0] * level * one)
    for jitter in JITTERS[1:]:
        failed = info.nonzero()[:, 0]  # waits for the device: a batch that fails nowhere is asked once
        if not len(failed):
            return L
        L[failed], info[failed] = torch.linalg.cholesky_ex(F[failed] + jitter * level[failed] * one)
    failed = info.nonzero()[:, 0]
    if len(failed):
        raise indefinite(int(failed[0]))
    return L


def mean_eigenvalue(F: Tensor) -> Tensor:
    """`tr F / n` [b]: what the jitter is relative to."""
    return F.diagonal(dim1=-2, dim2=-1).mean(-1)


def indefinite(index: int) -> BatchError:
    """The error of a matrix that no jitter helps."""
    return BatchError("its gradient moment is not positive semidefinite", index)


def roofline(key: Key, ceilings: registry.Ceilings | None = None) -> registry.Roofline:
    """Cholesky n³/3, `Lᵀ M L` 5n³/3, P and Q n³ each, as triangles; the eigenproblem 4n³/3 and 2n³.

    Reduction and back-transform of the eigenproblem, that is; what lies between them is small. M, F, P, Q pass once.
    """
    flops = key.b * key.n**3 * (10 + 12 * key.weighted) // 3
    return registry.Roofline.of(flops, key.dtype.itemsize * key.b * key.n**2 * (3 + key.weighted), key.dtype, ceilings)


registry.register_op(OP, Key, roofline, registry.Candidate("torch", lambda key: None, reference, ran_on=("CPU",)))
