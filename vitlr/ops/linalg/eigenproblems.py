"""The eigenproblems behind every decomposition: pairs of moments in, all ranks out. Knows matrices, no models.

`min ‖F^{1/2} (1 − P_r Q_r) M^{1/2}‖_F²` for all r at once: `F = Rᵀ R`, `R M Rᵀ = U Λ Uᵀ`, `P = R⁻¹ U`, `Q = Uᵀ R`;
the first r columns of P and rows of Q are the answer for rank r, at a loss of `Σ_{i≥r} λ_i`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.linalg.batched_solve import back_transform, batched_solve, check, damped_cholesky
from vitlr.ops.linalg.eigh import eigh
from vitlr.ops.linalg.weighted_gram_chain import weighted_gram_chain

SWEEPS = (1e-3, 1e-6)  # fp32: what lies below this part of the largest eigenvalue is solved again on its own

Eigensolver = Callable[[Tensor], tuple[Tensor, Tensor]]


def solve(M: Tensor, F: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Solve `min ‖F^{1/2}(1 − P_r Q_r)M^{1/2}‖²` for all r: energies `[n]` (descending, ≥ 0), `P, Q [n, n]`, `Q P = 1`.

    M symmetric positive semidefinite, possibly singular; F positive semidefinite up to rounding, or None for the
    identity. Raises `torch.linalg.LinAlgError` on no convergence.
    """
    if F is None:
        energies, U = torch.linalg.eigh(M)
        U = U.flip(-1)
        return energies.flip(-1).clamp_min(0), U, U.mT
    L = damped_cholesky(F[None])[0]  # R = Lᵀ
    K = L.mT @ M @ L
    energies, U = torch.linalg.eigh((K + K.mT) / 2)
    U = U.flip(-1)
    P = torch.linalg.solve_triangular(L.mT, U, upper=True)
    return energies.flip(-1).clamp_min(0), P, U.mT @ L.mT


def solve_batch(
    M: Tensor, F: Tensor | None = None, *, precision: str = "fp64", eigensolver: Eigensolver | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`solve` for a batch of one size: M, F `[b, n, n]` fp64 -> energies `[b, n]`, `P, Q [b, n, n]`.

    By the candidate of `batched_solve` that dispatch prefers. `precision="fp32"` is for cards with slow fp64: Cholesky
    factor and `R M Rᵀ` stay in fp64, the eigenproblems are solved in fp32, the tail of the spectrum twice more on its
    own (see `SWEEPS`). The excess loss of a rank is then typically below 1e-6 of its optimal loss. `eigensolver` maps
    `[b, n, n]` to eigenvalues, ascending, and vectors; with one, plain torch does the rest.

    Raises `BatchError`, whose `index` says which matrix, where one is not semidefinite or does not converge.
    """
    if precision not in ("fp64", "fp32"):
        raise InputError(f"precision={precision!r}, expected 'fp64' or 'fp32'")
    if precision == "fp64" and eigensolver is None:
        return batched_solve(M, F)
    check(M, F)
    if not len(M):
        return M.new_empty(M.shape[:2]), M.clone(), M.clone()
    L = None if F is None else damped_cholesky(F)
    K = M if L is None else weighted_gram_chain(L.mT, M)
    one = eigensolver or eigh
    return back_transform(L, *(one(K) if precision == "fp64" else _in_sweeps(K, one)))


class Factored(NamedTuple):
    """All ranks of a batch of layers: rank r is `A[:, :, :r] @ B[:, :r]`, and costs `errors[:, r]`."""

    energies: Tensor
    errors: Tensor
    A: Tensor
    B: Tensor


def weighted_svd(W: Tensor, M: Tensor, F: Tensor | None = None, *, side: str) -> Factored:
    """The activation-weighted SVD of a batch of layers: W `[b, N, K]` and moments to factors and errors of every rank.

    `side="output"`: M is the moment of the outputs `[b, N, N]`, F that of their gradients (None: the identity).
    `side="input"`: M is the moment of the inputs `[b, K, K]`, F that of `Wᵀ g` (None: `Wᵀ W`, the squared error of the
    outputs). With n the size of M: energies `[b, n]`, errors `[b, n + 1]`, A `[b, N, n]`, B `[b, n, K]`, on W's device,
    in fp64. Raises what `solve_batch` raises, and InputError for a W that does not fit.
    """
    if side not in ("output", "input"):
        raise InputError(f"side={side!r}, expected 'output' or 'input'")
    if W.dim() != 3 or M.shape != (len(W), *[W.shape[1 if side == "output" else 2]] * 2):
        raise InputError(
            f"W is {list(W.shape)} and M {list(M.shape)}, expected [b, N, K] and the square of its {side}s"
        )
    W, M = W.detach().double(), M.double()
    if F is None and side == "input":
        F = W.mT @ W
    energies, P, Q = solve_batch(M, None if F is None else F.double())
    tail = energies.flip(-1).cumsum(-1).flip(-1)
    errors = torch.cat([tail, tail.new_zeros(len(W), 1)], -1)
    return Factored(energies, errors, *((P, Q @ W) if side == "output" else (W @ P, Q)))


def _in_sweeps(K: Tensor, eigensolver: Eigensolver) -> tuple[Tensor, Tensor]:
    """`eigensolver` in fp32 for K in fp64: values [b, n] ascending, vectors [b, n, n] orthonormal to 1e-11.

    In fp32 the eigenvectors of a small λ are off by `ε λ_max / λ`. What the first solve puts into the tail is therefore
    formed again from K, in fp64, on its own scale, and solved again, once for each level in `SWEEPS`.
    """
    energies, U = _scaled(K, eigensolver)
    for level in SWEEPS:
        tail = energies < level * energies[:, -1:]  # the first ones: energies ascend
        t = int(tail.sum(-1).max())
        if t == 0:
            break
        tail = tail[:, :t]
        T = weighted_gram_chain(U[:, :, :t].mT, K) * (tail[:, :, None] & tail[:, None, :])
        # The columns in which this matrix has no tail, though others of the batch do, stay: last, and each for itself.
        largest = T.abs().amax((-2, -1))[:, None]
        stay = torch.arange(2, t + 2, dtype=K.dtype, device=K.device) * largest
        part, V = _scaled(T + torch.diag_embed(torch.where(tail, 0.0, stay)), eigensolver)
        energies[:, :t] = torch.where(tail, part, energies[:, :t])
        U[:, :, :t] = U[:, :, :t] @ V
    U = 1.5 * U - 0.5 * U @ (U.mT @ U)  # one Newton step to orthonormal columns: fp32 leaves 1e-6
    energies, order = energies.sort(-1)
    return energies, U.gather(-1, order[:, None].expand_as(U))


def _scaled(K: Tensor, eigensolver: Eigensolver) -> tuple[Tensor, Tensor]:
    """The eigenproblem in fp32, with entries of at most 1: a moment may be of any size."""
    scale = K.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(K.dtype).tiny)
    energies, U = eigensolver((K / scale).float())
    return energies.to(K.dtype) * scale[..., 0], U.to(K.dtype)


DAMPING = 0.1  # best on held-out calibration images where images are few, level with 0.01 where they are many
