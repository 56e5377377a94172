"""Eigenvalues and vectors of a batch of symmetric matrices: torch's solver, or cuSOLVER's batched one.

`torch.linalg.eigh` loops over a batch of matrices larger than 32 in torch <= 2.11; `cusolverDnXsyevBatched` (CUDA
12.6.2 and later) takes them all at once. VITLR_EIGH=torch|cusolver chooses; torch's is the default, because the other
one never ran on real hardware.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.backends import cusolver
from vitlr.ops.linalg.threads import in_threads

VARIABLE = "VITLR_EIGH"
SOLVERS = ("torch", "cusolver")


class BatchError(torch.linalg.LinAlgError):
    """A matrix of a batch could not be solved; `index` says which, `reason` why."""

    def __init__(self, reason: str, index: int) -> None:
        super().__init__(f"matrix {index} of the batch: {reason}")
        self.reason, self.index = reason, index


def eigh(K: Tensor, solver: str | None = None) -> tuple[Tensor, Tensor]:
    """`K = U Λ Uᵀ`: K [b, n, n] symmetric (the lower triangle is read) -> eigenvalues [b, n], ascending, U [b, n, n].

    fp32 or fp64. `solver`: "torch" or "cusolver", by default what VITLR_EIGH says, else torch. Raises `BatchError` with
    the index of a matrix on which the solver does not converge, `InputError` where a solver cannot run.
    """
    solver = solver or os.environ.get(VARIABLE) or "torch"
    if solver not in SOLVERS:
        raise InputError(f"{VARIABLE}={solver}: unknown eigensolver, expected one of {', '.join(SOLVERS)}")
    if K.dim() != 3 or K.shape[1] != K.shape[2] or K.dtype not in (torch.float32, torch.float64):
        raise InputError(f"eigh: K is {list(K.shape)} {K.dtype}, expected [b, n, n] in fp32 or fp64")
    if solver == "torch":
        return _torch(K)
    refusal = cusolver.why_not(K.device)
    if refusal is not None:
        raise InputError(f"{VARIABLE}=cusolver cannot run here: {refusal}")
    energies, U, info = cusolver.syev_batched(K)
    error = failure(K, info)
    if error is not None:
        raise error
    return energies, U


def failure(K: Tensor, info: Tensor) -> BatchError | None:
    """What cuSOLVER's info [b] says of K [b, n, n]: the error of the first one, or None. Waits for it."""
    failed = info.nonzero()[:, 0]
    if not len(failed):
        return None
    index = int(failed[0])
    return BatchError(_reason(K[index], int(info[index])), index)


def _torch(K: Tensor) -> tuple[Tensor, Tensor]:
    try:
        if K.device.type == "cpu" and K.shape[1] >= 128:
            pairs = in_threads(torch.linalg.eigh, K.unbind())
            return torch.stack([values for values, _ in pairs]), torch.stack([vectors for _, vectors in pairs])
        energies, U = torch.linalg.eigh(K)
        return energies, U
    except torch.linalg.LinAlgError:
        for index, one in enumerate(K):  # torch names no index in a form to rely on, so each is asked
            try:
                torch.linalg.eigh(one)
            except torch.linalg.LinAlgError as cause:
                raise BatchError(str(cause), index) from cause
        raise


def _reason(K: Tensor, info: int) -> str:
    if not torch.isfinite(K).all():
        return "it holds NaN or Inf"
    return f"cuSOLVER did not converge (info {info})"
