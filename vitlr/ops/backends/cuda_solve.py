"""The solve's CUDA candidates: `W C Wᵀ` and the whole solve on fp64 tensor cores (csrc/cuda; compiled, not run).

Nothing leaves the GPU: workspace comes from torch's allocator, every launch goes to the current stream. `enqueue` never
waits and, cuSOLVER's part aside, can be captured in a CUDA graph; `solve` waits once, to ask whether all went well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitlr.ops.backends import cusolver, native
from vitlr.ops.dispatch.registry import Candidate, register
from vitlr.ops.linalg import batched_solve, weighted_gram_chain

PANEL = 64  # columns of a panel of the factorisation: `_cuda.panel`
FULL_RATE = (80, 90, 100)  # compute capabilities whose fp64 is no afterthought


def why_not(key: Any) -> str | None:
    """Why these kernels cannot run on a device and dtype; None where they can."""
    if key.dtype != torch.float64:
        return f"the matrices are {key.dtype}, these kernels are for torch.float64"
    refusal = native.cuda_why_not(key.device)
    if refusal is None and native.capability(key.device) < 80:
        refusal = "fp64 tensor cores need compute capability 8.0 or later"
    return refusal


def slow(key: Any) -> str | None:
    """Why it does not pay on a GPU whose fp64 is a few percent of its fp32; None on the others."""
    found = native.capability(key.device)
    return None if found in FULL_RATE else f"fp64 is slow on compute capability {found / 10:.1f}: use precision='fp32'"


def chain(W: Tensor, C: Tensor) -> Tensor:
    """`W C Wᵀ`: W [b, m, k], C [b, k, k] symmetric, any strides -> [b, m, m], exactly symmetric."""
    b, m, k = W.shape
    P, Y = W.new_empty(b, m, k), W.new_empty(b, m, m)
    _multiply(W, C, P)
    _multiply(P, W.mT, Y, symmetric=True)
    return Y


class Factor(NamedTuple):
    """`F + shift 1 = L Lᵀ`: L [b, n, n], the inverses of its diagonal blocks [b, panels, 64, 64], info [b] int32."""

    L: Tensor
    inverse: Tensor
    info: Tensor


def cholesky(F: Tensor, shift: Tensor) -> Factor:
    """The factor of F [b, n, n] with shift [b] on the diagonal; info is 1 + the column that failed, or 0."""
    b, n, _ = F.shape
    inverse = F.new_empty(b, -(-n // PANEL), PANEL, PANEL)
    found = Factor(F.new_empty(b, n, n), inverse, torch.zeros(b, dtype=torch.int32, device=F.device))
    shift = shift.contiguous()
    pointers = (found.inverse.data_ptr(), shift.data_ptr(), found.info.data_ptr())
    native.cuda_call("cholesky", _fields(F), _fields(found.L), *pointers, b, n, device=F.device)
    return found


def congruence(L: Tensor, M: Tensor) -> Tensor:
    """`Lᵀ M L` for L [b, n, n] lower triangular: less than six tenths of the work of `chain`."""
    Y, P = torch.empty_like(L), torch.empty_like(L)
    _multiply(L.mT, M, P, upper_X=True)
    _multiply(P, L, Y, symmetric=True, lower_Y=True)
    return Y


def projectors(factor: Factor, U: Tensor) -> tuple[Tensor, Tensor]:
    """`P = L⁻ᵀ U'` and `Q = U'ᵀ Lᵀ`, U' the columns of U [b, n, n] in reverse: by energies descending."""
    b, n, _ = U.shape
    P, Q = U.new_empty(b, n, n).mT, U.new_empty(b, n, n)  # P by columns: each is substituted for itself
    address, batch, row, column = _fields(U)
    reverse = (address + (n - 1) * column * U.element_size(), batch, row, -column)
    L = _fields(factor.L)
    inverse = factor.inverse.data_ptr()
    native.cuda_call("back_substitution", L, reverse, _fields(P), inverse, b, n, n, device=U.device)
    turned = (reverse[0], batch, -column, row)
    flags = (False, False, False, True)
    native.cuda_call("weighted_chain", turned, _fields(factor.L.mT), _fields(Q), b, n, n, n, *flags, device=U.device)
    return P, Q


class Enqueued(NamedTuple):
    """A solution that counts where both infos [b] are 0."""

    energies: Tensor
    P: Tensor
    Q: Tensor
    not_definite: Tensor
    not_converged: Tensor


def enqueue(M: Tensor, F: Tensor, shift: Tensor) -> Enqueued:
    """The solve with `F + shift 1`, launched and not waited for."""
    factor = cholesky(F, shift)
    # A matrix without a factor is solved again later: what the eigensolver gets in its place must only be finite.
    K = congruence(factor.L, M).masked_fill_((factor.info != 0)[:, None, None], 0)
    energies, U, info = cusolver.syev_batched(K, overwrite=True)
    return Enqueued(energies.flip(-1).clamp_min_(0), *projectors(factor, U), factor.info, info)


def solve(M: Tensor, F: Tensor | None = None) -> batched_solve.Solution:
    """As `batched_solve.reference`; matrices that need more jitter are solved again, with the others left alone."""
    if F is None:
        return batched_solve.back_transform(None, *cusolver.solve(M))
    level = batched_solve.mean_eigenvalue(F)
    found = enqueue(M, F, batched_solve.JITTERS[0] * level)
    again = _indices(found.not_definite, found.not_converged, M)
    for jitter in batched_solve.JITTERS[1:]:
        if not len(again):
            return found[:3]
        part = enqueue(M[again], F[again], jitter * level[again])
        for whole, fresh in zip(found, part, strict=True):
            whole[again] = fresh
        again = _indices(found.not_definite, found.not_converged, M)
    if len(again):
        raise batched_solve.indefinite(int(again[0]))
    return found[:3]


def _indices(not_definite: Tensor, not_converged: Tensor, M: Tensor) -> Tensor:
    """The matrices to factor again; the one wait for the device. What did not converge though factored is an error."""
    infos = torch.stack([not_definite, not_converged]).cpu()
    cusolver.settle(M, infos[1] * (infos[0] == 0))
    return infos[0].nonzero()[:, 0].to(M.device)


def _multiply(
    X: Tensor,
    Y: Tensor,
    out: Tensor,
    *,
    symmetric: bool = False,
    upper_X: bool = False,
    lower_Y: bool = False,
) -> None:
    """out = X Y, of which a triangle of X or Y may be known to be zero."""
    (b, M, K), N = X.shape, Y.shape[-1]
    flags = (symmetric, upper_X, lower_Y, False)
    native.cuda_call("weighted_chain", _fields(X), _fields(Y), _fields(out), b, M, N, K, *flags, device=out.device)


def _fields(A: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of a batch of matrices, as the bindings take them."""
    batch, row, column = A.stride()
    return A.data_ptr(), batch, row, column


def _solve_why_not(key: batched_solve.Key) -> str | None:
    return why_not(key) or cusolver.objection(key)


register(weighted_gram_chain.OP, Candidate("cuda.tensor_cores", why_not, chain, worth=slow))
register(batched_solve.OP, Candidate("cuda.fused", _solve_why_not, solve, worth=slow))
