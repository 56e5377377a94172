"""The gate's fourth question: how long does the batched solve of a whole ViT-B take?

48 problems of size 768: a loop of `torch.linalg.eigh`, its batched call, vitlr's solve in both precisions, the
matmul-only solver for a wanted rank, and every candidate of the solve of pairs with both factors; errors before times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases.clock import microseconds
from vitlr.ops.backends import cuda_solve, cusolver
from vitlr.ops.dispatch import registry
from vitlr.ops.linalg import batched_solve
from vitlr.ops.linalg.eigenproblems import solve_batch
from vitlr.ops.linalg.eigh import eigh
from vitlr.ops.linalg.subspace import leading_subspace


def problems(count: int, n: int, device: torch.device) -> Tensor:
    """Moments `[count, n, n]` in fp64 whose spectra fall by six orders of magnitude, as those of activations do."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(count, n, n, generator=generator, dtype=torch.float64)).Q
    energies = torch.logspace(0, -6, n, dtype=torch.float64)
    return ((Q * energies) @ Q.mT).to(device)


def run(device: torch.device, count: int = 48, n: int = 768, rank: int = 128) -> list[dict[str, Any]]:
    """Rows {solver, ms, times_as_fast, excess}: speed against the loop, excess loss relative to the optimal tail.

    Those "of pairs" solve for M and F with both factors, the others for M alone.
    """
    M = problems(count, n, device)
    functions: dict[str, Callable[..., Any]] = {
        "loop of torch.linalg.eigh": lambda: [torch.linalg.eigh(matrix) for matrix in M],
        "torch.linalg.eigh, batched": lambda: torch.linalg.eigh(M),
        "solve_batch fp64": lambda: solve_batch(M),
        "solve_batch fp32 with sweeps": lambda: solve_batch(M, precision="fp32"),
        f"leading_subspace fp32, rank {rank}": lambda: leading_subspace(M, rank),
    }
    if cusolver.why_not(device) is None:
        functions["cusolverDnXsyevBatched"] = lambda: eigh(M, "cusolver")
        functions["solve_batch by cuSOLVER"] = lambda: solve_batch(M, eigensolver=lambda K: eigh(K, "cusolver"))
    bases = {name: _basis(name, function(), rank) for name, function in functions.items()}
    exact = bases["torch.linalg.eigh, batched"]
    best = _tail(M, exact)
    excess = {name: float(((_tail(M, basis) - best) / best).max()) for name, basis in bases.items()}
    F = M.flip(-1, -2).contiguous() + 0.1 / n * torch.eye(n, dtype=M.dtype, device=device)
    for name, solve in _of_pairs(M, F).items():
        energies, P, Q = solve()
        least = energies[:, rank:].sum(-1)
        excess[name] = float(((_loss(M, F, P[..., :rank], Q[:, :rank]) - least) / least).abs().max())
        functions[name] = solve
    functions |= _parts(M, F)
    us = microseconds(functions, [()], device, rounds=2, graphs=False)
    loop = us["loop of torch.linalg.eigh"]
    return [
        {
            "solver": name,
            "ms": round(value / 1e3, 3),
            "times_as_fast": round(loop / value, 2),
            "excess": excess.get(name),
        }
        for name, value in us.items()
    ]


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Solvers that lose what they should not: 1e-4 of the tail at most, 1e-6 those in fp64."""
    bounds = {row["solver"]: 1e-4 if "fp32" in row["solver"] else 1e-6 for row in rows}
    lost = [row for row in rows if row["excess"] is not None and not abs(row["excess"]) <= bounds[row["solver"]]]
    return [f"{row['solver']}: its loss is off by {row['excess']:.1e} of the optimal one" for row in lost]


def _of_pairs(M: Tensor, F: Tensor) -> dict[str, Callable[..., Any]]:
    """Every candidate of `batched_solve` that can run here."""
    key = batched_solve.Key(len(M), M.shape[-1], True, M.dtype, M.device)
    able = [c for c in registry.candidates(batched_solve.OP) if c.supports(key) is None]
    return {f"{candidate.name}, of pairs": lambda run=candidate.run: run(M, F) for candidate in able}


def _parts(M: Tensor, F: Tensor) -> dict[str, Callable[..., Any]]:
    """What "cuda.fused" consists of, but for the eigensolver, to be held against the predictions in the docs."""
    key = batched_solve.Key(len(M), M.shape[-1], True, M.dtype, M.device)
    if cuda_solve.why_not(key) is not None:
        return {}
    shift = 1e-12 * batched_solve.mean_eigenvalue(F)
    factor = cuda_solve.cholesky(F, shift)
    return {
        "part: cholesky": lambda: cuda_solve.cholesky(F, shift),
        "part: congruence": lambda: cuda_solve.congruence(factor.L, M),
        "part: projectors": lambda: cuda_solve.projectors(factor, M),
        "torch: cholesky": lambda: torch.linalg.cholesky_ex(F),
        "torch: congruence": lambda: factor.L.mT @ M @ factor.L,
        "torch: P": lambda: torch.linalg.solve_triangular(factor.L.mT, M, upper=True),
    }


def captured(device: torch.device, count: int = 4, n: int = 200) -> list[dict[str, Any]]:
    """What of "cuda.fused" a CUDA graph holds: rows {part, problem}; problem is None where a replay gives the same."""
    M = problems(count, n, device)
    F = M.flip(-1, -2).contiguous() + torch.eye(n, dtype=M.dtype, device=device)
    if cuda_solve.why_not(batched_solve.Key(count, n, True, M.dtype, M.device)) is not None:
        return []
    shift = 1e-12 * batched_solve.mean_eigenvalue(F)
    factor = cuda_solve.cholesky(F, shift)
    parts: dict[str, Callable[[], Any]] = {
        "cholesky": lambda: cuda_solve.cholesky(F, shift),
        "congruence": lambda: (cuda_solve.congruence(factor.L, M),),
        "projectors": lambda: cuda_solve.projectors(factor, M),
        "all, with cuSOLVER": lambda: cuda_solve.enqueue(M, F, shift),
    }
    return [{"part": name, "problem": _capture(part)} for name, part in parts.items()]


def _capture(part: Callable[[], Any]) -> str | None:
    expected, graph = part(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            found = part()
        for tensor in found:
            tensor.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as cause:  # what cannot be captured says so, and the others still can
        return f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
    same = all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(found, expected, strict=True))
    return None if same else "a replay gives something else"


def _loss(M: Tensor, F: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    """`‖F^{1/2} (1 − P Q) M^{1/2}‖²` [count]."""
    rest = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device) - P @ Q
    return ((rest.mT @ F @ rest) * M).sum((-2, -1))


def _basis(name: str, result: Any, rank: int) -> Tensor:
    """The leading `[count, n, rank]` directions in whatever form a solver returns them."""
    if name.startswith("loop"):
        return torch.stack([vectors for _, vectors in result])[..., -rank:]
    if name.startswith(("solve_batch", "leading")):
        return result[1][..., :rank]
    return result[1][..., -rank:]


def _tail(M: Tensor, U: Tensor) -> Tensor:
    """`tr M − tr Uᵀ M U` [count], with U orthonormalised: what is lost by keeping only the space of U."""
    U = torch.linalg.qr(U.double()).Q
    return M.diagonal(dim1=-2, dim2=-1).sum(-1) - (U * (M @ U)).sum((-2, -1))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| solver | ms | of the loop | excess loss |", "|---|---|---|---|"]
    lines += [f"| {r['solver']} | {r['ms']:.2f} | {r['times_as_fast']:.2f}x | {_told(r['excess'])} |" for r in rows]
    return "\n".join(lines)


def _told(excess: float | None) -> str:
    return "" if excess is None else f"{excess:.1e}"
