"""The gate's fourth question: how long does the batched solve of a whole ViT-B take?

48 problems of size 768: a loop of `torch.linalg.eigh`, its batched call, vitlr's solve in both precisions, and the
matmul-only solver for a wanted rank; errors against the fp64 loop before any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _clock import microseconds
from torch import Tensor

from vitlr.ops import _cusolver
from vitlr.ops.eigh import eigh
from vitlr.solver import solve_batch
from vitlr.subspace import leading_subspace


def problems(count: int, n: int, device: torch.device) -> Tensor:
    """Moments `[count, n, n]` in fp64 whose spectra fall by six orders of magnitude, as those of activations do."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(count, n, n, generator=generator, dtype=torch.float64)).Q
    energies = torch.logspace(0, -6, n, dtype=torch.float64)
    return ((Q * energies) @ Q.mT).to(device)


def run(device: torch.device, count: int = 48, n: int = 768, rank: int = 128) -> list[dict[str, Any]]:
    """Rows {solver, ms, times_as_fast, excess}: speed against the loop, excess loss relative to the optimal tail."""
    M = problems(count, n, device)
    functions: dict[str, Callable[..., Any]] = {
        "loop of torch.linalg.eigh": lambda: [torch.linalg.eigh(matrix) for matrix in M],
        "torch.linalg.eigh, batched": lambda: torch.linalg.eigh(M),
        "solve_batch fp64": lambda: solve_batch(M),
        "solve_batch fp32 with sweeps": lambda: solve_batch(M, precision="fp32"),
        f"leading_subspace fp32, rank {rank}": lambda: leading_subspace(M, rank),
    }
    if _cusolver.why_not(device) is None:
        functions["cusolverDnXsyevBatched"] = lambda: eigh(M, "cusolver")
        functions["solve_batch by cuSOLVER"] = lambda: solve_batch(M, eigensolver=lambda K: eigh(K, "cusolver"))
    bases = {name: _basis(name, function(), rank) for name, function in functions.items()}
    exact = bases["torch.linalg.eigh, batched"]
    best = _tail(M, exact)
    us = microseconds(functions, [()], device, rounds=2, graphs=False)
    loop = us["loop of torch.linalg.eigh"]
    return [
        {
            "solver": name,
            "ms": round(value / 1e3, 3),
            "times_as_fast": round(loop / value, 2),
            "excess": float(((_tail(M, bases[name]) - best) / best).max()),
        }
        for name, value in us.items()
    ]


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
    lines += [f"| {r['solver']} | {r['ms']:.1f} | {r['times_as_fast']:.2f}x | {r['excess']:.1e} |" for r in rows]
    return "\n".join(lines)
