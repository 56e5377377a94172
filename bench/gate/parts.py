"""The parts of the batched solve on a GPU, each against torch: eager, and captured in a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases.calls import Random
from bench.cases.correctness import Fault
from vitlr.ops.backends import cuda_solve, cusolver
from vitlr.ops.linalg import batched_solve

Part = Callable[[], tuple[Tensor, ...]]


def check(name: str, n: int, device: torch.device, count: int = 3) -> str | None:
    """Raises Fault where a part is not what torch computes in fp64; the reason where it cannot run here."""
    part = name.removeprefix("capture ")
    key = batched_solve.Key(count, n, True, torch.float64, device)
    refusal = cusolver.why_not(device) if part == "XsyevBatched" else cuda_solve.why_not(key)
    if refusal is not None:
        return refusal
    X = Random(n, torch.float64, device)(count, n, n)
    F = X @ X.mT / n + torch.eye(n, dtype=X.dtype, device=device)
    shift = torch.full((count,), 1e-3, dtype=X.dtype, device=device)
    part_of, expected = _part(part, F, X, shift)
    found = _replayed(part_of) if name != part else part_of()
    torch.cuda.synchronize(device)
    for one, other in zip(found, expected, strict=True):
        if not torch.isfinite(one).all():
            raise Fault("nan", f"{name} n={n}: NaN or Inf")
        error = float((one - other).abs().max() / other.abs().max())
        if not error <= 1e-9:
            raise Fault("wrong", f"{name} n={n}: off by {error:.1e} of the largest entry")
    return None


def _part(name: str, F: Tensor, X: Tensor, shift: Tensor) -> tuple[Part, tuple[Tensor, ...]]:
    """A part, and what it should give."""
    shifted = F + shift[:, None, None] * torch.eye(F.shape[-1], dtype=F.dtype, device=F.device)
    L = torch.linalg.cholesky(shifted)
    M = X @ X.mT
    if name == "cholesky":
        return lambda: (cuda_solve.cholesky(F, shift).L.tril(),), (L,)
    if name == "congruence":
        return lambda: (cuda_solve.congruence(L, M),), (L.mT @ M @ L,)
    if name == "projectors":
        factor = cuda_solve.cholesky(F, shift)
        U = torch.linalg.qr(X).Q
        turned = U.flip(-1)
        expected = torch.linalg.solve_triangular(L.mT, turned, upper=True), turned.mT @ L.mT
        return lambda: cuda_solve.projectors(factor, U), expected
    return lambda: (_restored(*cusolver.syev_batched(F)[:2]),), (F,)


def _restored(energies: Tensor, U: Tensor) -> Tensor:
    return (U * energies[:, None]) @ U.mT


def _replayed(part: Part) -> tuple[Tensor, ...]:
    part()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = part()
    for tensor in found:
        tensor.fill_(-1)
    graph.replay()
    return found
