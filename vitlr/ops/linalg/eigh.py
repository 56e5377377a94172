"""Eigenvalues and vectors of a batch of symmetric matrices.

`torch.linalg.eigh` loops over a batch of matrices larger than 32 in torch <= 2.11; `cusolverDnXsyevBatched` (CUDA
12.6.2 and later) takes them all at once. VITLR_EIGH=torch|cusolver chooses; VITLR_BACKEND does not reach this op.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.linalg.threads import in_threads

OP = "eigh"
VARIABLE = "VITLR_EIGH"


def reference(K: Tensor) -> tuple[Tensor, Tensor]:
    """The specification, in plain torch; raises `BatchError`."""
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


class BatchError(torch.linalg.LinAlgError):
    """A matrix of a batch could not be solved; `index` says which, `reason` why."""

    def __init__(self, reason: str, index: int) -> None:
        super().__init__(f"matrix {index} of the batch: {reason}")
        self.reason, self.index = reason, index


class Key(NamedTuple):
    """What dispatch knows of a call."""

    b: int
    n: int
    dtype: torch.dtype = torch.float64
    device: torch.device = torch.device("cpu")


def eigh(K: Tensor, solver: str | None = None) -> tuple[Tensor, Tensor]:
    """`K = U Λ Uᵀ`: K [b, n, n] symmetric (the lower triangle is read) -> eigenvalues [b, n], ascending, U [b, n, n].

    fp32 or fp64. `solver`: "torch" or "cusolver", by default what VITLR_EIGH says, else what dispatch prefers. Raises
    `BatchError` with the index of a matrix on which the solver does not converge, `InputError` where a solver cannot
    run.
    """
    if (
        K.layout != torch.strided
        or K.dim() != 3
        or K.shape[1] != K.shape[2]
        or K.dtype not in (torch.float32, torch.float64)
    ):
        raise InputError(f"eigh: K is {list(K.shape)} {K.dtype}, expected [b, n, n] in fp32 or fp64")
    return registry.select(OP, Key(len(K), K.shape[1], K.dtype, K.device), solver).run(K)


def roofline(key: Key, ceilings: registry.Ceilings | None = None) -> registry.Roofline:
    """Reduction 4n³/3 and back-transform 2n³ FLOPs; what lies between is small. K and U pass once."""
    size = key.dtype.itemsize * key.b * 2 * key.n**2
    return registry.Roofline.of(key.b * key.n**3 * 10 // 3, size, key.dtype, ceilings)


registry.register_op(
    OP,
    Key,
    roofline,
    registry.Candidate("torch", lambda key: None, reference, ran_on=("CPU",)),
    registry.Override(VARIABLE, "eigensolver", ("torch",)),
)
