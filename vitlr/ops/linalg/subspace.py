"""The leading eigenspace of a wanted rank by matrix products alone: no eigensolver larger than a block of that rank.

A block of vectors is multiplied by K a few times; what has become eigenvectors by then, which are the largest ones, is
deflated, because it would set the scale. The sign function of the rest minus σ, by the Polar Express iteration
(arXiv 2505.16932), is a filter that keeps the eigenvectors above σ; the block is filtered and turned into
eigenvectors (Rayleigh-Ritz). `(n + tr sign(D − σ)) / 2` counts eigenvalues above σ, which is how σ is found.

Everything is batched, and the products come from a `Backend`, so that the same lines run on a CPU and on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.linalg.eigh import BatchError
from vitlr.ops.linalg.gram import exact_products

POWERS = 4  # products with K before what has converged is deflated
CONVERGED = 1e-12  # loss that an eigenvector may cost by being deflated, relative to the tail
STEPS, RESOLUTION = 10, 1e-4  # sign iterations, and the smallest |λ − σ| / ‖D‖ whose sign they settle
EVALUATIONS = 6  # of the sign function, at most, while σ is sought
_NOTHING = 1e-14  # of the trace: what is below is rounding
FILTERS, FLOOR = 3, 1e-2  # passes of the filter, and what each leaves of vectors below σ: zero would cost the full rank


def _product(A: Tensor, B: Tensor) -> Tensor:
    with exact_products(A.device) if A.dtype == torch.float32 else nullcontext():
        return A @ B


def _symmetric_product(A: Tensor, B: Tensor) -> Tensor:
    P = _product(A, B)
    return (P + P.mT) / 2


def _eigh(H: Tensor) -> tuple[Tensor, Tensor]:
    energies, U = torch.linalg.eigh(H)
    return energies, U


@dataclass(frozen=True)
class Backend:
    """Batched: `matmul(A, B)`, `symmetric(A, B)` of matrices that commute, `eigh` of small ones [b, m, m].

    Products in fp32 must be IEEE: TF32 spoils the filter.
    """

    matmul: Callable[[Tensor, Tensor], Tensor] = _product
    symmetric: Callable[[Tensor, Tensor], Tensor] = _symmetric_product
    eigh: Callable[[Tensor], tuple[Tensor, Tensor]] = _eigh


TORCH = Backend()


def leading_subspace(
    K: Tensor, rank: int, *, backend: Backend = TORCH, iterate: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues of K [b, n, n], descending [b, rank], and their space U [b, n, rank], in fp64.

    K symmetric positive semidefinite up to rounding, fp32 or fp64. The n x n iterations run in `iterate`, the thin
    products in fp64. The measure is the loss `tr K − tr Uᵀ K U`, not the angle: where eigenvalues cluster around the
    cut any of their vectors serves. Raises InputError for shapes and ranks that do not fit, `BatchError` with the index
    of a matrix that holds NaN or Inf.
    """
    if K.dim() != 3 or K.shape[1] != K.shape[2] or not 1 <= rank <= K.shape[1]:
        raise InputError(f"K is {list(K.shape)} and rank {rank}, expected [b, n, n] and a rank from 1 to n")
    b, n, _ = K.shape
    broken = (~K.isfinite().all(-1).all(-1)).nonzero()[:, 0]
    if len(broken):
        raise BatchError("it holds NaN or Inf", int(broken[0]))
    scale = K.diagonal(dim1=-2, dim2=-1).double().sum(-1).clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    K = K.double() / scale[..., None]
    extra = max(16, rank // 8)
    block = rank + extra
    if 2 * block >= n:  # a block of that size is no smaller problem
        energies, U = backend.eigh(K)
        return energies.flip(-1)[:, :rank].clamp_min(0) * scale, U.flip(-1)[..., :rank]
    generator = torch.Generator(K.device).manual_seed(seed)
    Y = torch.randn(b, n, block, generator=generator, dtype=K.dtype, device=K.device)
    for _ in range(POWERS):
        Y = _orthonormal(backend.matmul(K, Y) + _NOTHING * Y, backend)  # K alone may be of lower rank than Y
    theta, Y, Z = _ritz(K, Y, backend)

    # An eigenvector q with residual ρ = ‖K q − θ q‖ costs at most about ρ² / θ when it is split off.
    residual = (Z - Y * theta[:, None]).square().sum(-2)
    tail = (1 - theta[:, :rank].sum(-1, keepdim=True)).clamp_min(_NOTHING)
    converged = (residual <= CONVERGED * theta * tail).cumprod(-1).bool()  # [b, block], from the largest on
    found = converged.sum(-1)
    Q = Y * converged[:, None]
    QK = backend.matmul(Q.mT, K)
    D = K - backend.matmul(Q, QK)
    D = D - backend.matmul(backend.matmul(D, Q), Q.mT)
    S = _above((D + D.mT).to(iterate) / 2, theta, found, rank, extra, backend)
    for _ in range(FILTERS):
        above = backend.matmul(S, Y.to(iterate)).to(K.dtype) + 2 * backend.matmul(Q, backend.matmul(Q.mT, Y))
        Y = _orthonormal(((1 + FLOOR) * Y + (1 - FLOOR) * above) / 2, backend)
    theta, U, Z = _ritz(K, Y, backend)
    # One more product with K, in fp64, takes out what fp32 left of the tail.
    theta, U, _ = _ritz(K, _orthonormal(Z + _NOTHING * U, backend), backend)
    return theta[:, :rank].clamp_min(0) * scale, U[..., :rank]


def _ritz(K: Tensor, Y: Tensor, backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz in the span of Y: values, descending, vectors, and K times the vectors."""
    Z = backend.matmul(K, Y)
    H = backend.matmul(Y.mT, Z)
    theta, T = backend.eigh((H + H.mT) / 2)
    T = T.flip(-1)
    return theta.flip(-1), backend.matmul(Y, T), backend.matmul(Z, T)


def _orthonormal(Y: Tensor, backend: Backend) -> Tensor:
    """Shifted Cholesky QR, three times (arXiv 1809.11085): the columns may depend on each other up to rounding."""
    Y = Y / torch.linalg.vector_norm(Y, dim=-2, keepdim=True).clamp_min(torch.finfo(Y.dtype).tiny)
    shift = 10 * Y.shape[-1] * torch.finfo(Y.dtype).eps
    for added in (shift, shift, 0.0):
        G = backend.matmul(Y.mT, Y)
        G.diagonal(dim1=-2, dim2=-1).add_(added)
        Y = torch.linalg.solve_triangular(torch.linalg.cholesky(G).mT, Y, upper=True, left=False)
    return Y


def _above(D: Tensor, theta: Tensor, found: Tensor, rank: int, extra: int, backend: Backend) -> Tensor:
    """`sign(D − σ)` [b, n, n] with σ such that about `rank − found + extra / 2` eigenvalues of D are above it.

    The first guess is a Ritz value of K; then regula falsi on the count over log σ. `−1` where nothing is wanted.
    """
    n = D.shape[-1]
    one = torch.eye(n, dtype=D.dtype, device=D.device)
    theta = theta.to(D.dtype)
    wanted = (rank - found).clamp_min(0).to(D.dtype)  # [b]
    largest = theta.gather(1, found.clamp_max(theta.shape[1] - 1)[:, None])[:, 0].clamp_min(_NOTHING)
    norm = largest * _norm_bound(D / largest[:, None, None], backend)
    least, target = RESOLUTION * norm, wanted + extra / 2
    low, high = least.clone(), torch.minimum(norm, 1.05 * largest)  # a Ritz value is a little below its eigenvalue
    many, few = torch.full_like(norm, n), torch.zeros_like(norm)  # eigenvalues above low and above high
    sigma = torch.maximum(theta[:, rank + extra // 8], least)
    S = -one.repeat(len(D), 1, 1)
    best = torch.full_like(norm, float("inf"))
    todo = (wanted > 0).nonzero()[:, 0]
    for _ in range(EVALUATIONS):
        if not len(todo):
            break
        s, w = sigma[todo], wanted[todo]
        # |λ − σ| / reach <= 1 for all λ in [0, norm], with room for what rounding adds.
        reach = 1.01 * torch.maximum(norm[todo] - s, s)[:, None, None]
        X = _sign((D[todo] - s[:, None, None] * one) / reach, backend)
        count = (n + X.diagonal(dim1=-2, dim2=-1).sum(-1)) / 2
        miss = torch.where(count >= w - 0.5, (count - w).abs(), n + w - count)  # better too many than too few
        better = miss < best[todo]
        S[todo[better]], best[todo[better]] = X[better], miss[better]
        above = count > target[todo]
        low[todo], many[todo] = torch.where(above, s, low[todo]), torch.where(above, count, many[todo])
        high[todo], few[todo] = torch.where(above, high[todo], s), torch.where(above, few[todo], count)
        settled = (count >= w + 0.5) & (count <= w + extra - 1)
        settled |= ~above & (s <= least[todo])  # no more are to be had
        settled |= high[todo] - low[todo] < 1e-3 * low[todo]  # a cluster: any of them serve
        todo = todo[~settled]
        part = (many[todo] - target[todo]) / (many[todo] - few[todo])
        # Neither end of the bracket may stand still: at least a tenth of it goes every time.
        sigma[todo] = low[todo] * (high[todo] / low[todo]) ** part.clamp(0.1, 0.9)
    return S


def _norm_bound(D: Tensor, backend: Backend) -> Tensor:
    """`‖D⁴‖_F^¼` [b]: never below the 2-norm, beyond which the iteration diverges, and at most `n^⅛` above it."""
    D2 = backend.symmetric(D, D)
    return torch.linalg.matrix_norm(backend.symmetric(D2, D2)) ** 0.25


def _sign(X: Tensor, backend: Backend) -> Tensor:
    """`sign(X)` of symmetric matrices with norms of at most 1."""
    for a, b, c in coefficients(RESOLUTION, STEPS):
        X2 = backend.symmetric(X, X)
        X = a * X + backend.symmetric(X, b * X2 + c * backend.symmetric(X2, X2))
    return X


@cache
def coefficients(resolution: float, steps: int) -> tuple[tuple[float, float, float], ...]:
    """`(a, b, c)` of each step `a x + b x³ + c x⁵`: together the best of sign on resolution <= |x| <= 1."""
    found: list[tuple[float, float, float]] = []
    low, high = resolution, 1.0
    for _ in range(steps):
        *abc, error = _quintic(low, high)
        found.append((abc[0], abc[1], abc[2]))
        low, high = 1 - error, 1 + error
    return tuple(found)


def _quintic(low: float, high: float) -> tuple[float, float, float, float]:
    """The odd quintic closest to 1 on [low, high], and its error, by Remez exchange of the two inner extrema."""
    if low / high > 1 - 5e-6:  # the limit, where the exchange is singular
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5, 1 - low / high
    points = torch.tensor([low, (3 * low + high) / 4, (low + 3 * high) / 4, high], dtype=torch.float64)
    error, before = 1.0, 2.0
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    while abs(error - before) > 1e-13:
        before = error
        a, b, c, error = torch.linalg.solve(
            torch.stack([points, points**3, points**5, signs], 1), torch.ones(4, dtype=torch.float64)
        ).tolist()
        root = (9 * b * b - 20 * a * c) ** 0.5
        points[1], points[2] = ((-3 * b - root) / (10 * c)) ** 0.5, ((-3 * b + root) / (10 * c)) ** 0.5
    return a, b, c, error
