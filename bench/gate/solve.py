"""How long does the batched solve of a whole ViT-B take, solver by solver?

48 problems of size 768: a loop of `torch.linalg.eigh`, its batched call, vitlr's solve in both precisions, the
matmul-only solver for a wanted rank, and every candidate of the solve of pairs with both factors. Excess loss is
relative to the optimal tail: in fp64 at most 1e-6, in fp32 1e-4.
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

Function = Callable[..., Any]
SHARE = 8  # problems that have the same eigenvectors, with other energies each: a QR takes longer than a solve


def problems(count: int, n: int, device: torch.device) -> Tensor:
    """Moments `[count, n, n]` in fp64 whose spectra fall by six orders of magnitude, as those of activations do."""
    generator = torch.Generator().manual_seed(0)
    few = -(-count // SHARE)
    X = torch.randn(few, n, n, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(X).Q.to(device).repeat(SHARE, 1, 1)[:count]  # on the CPU: a GPU takes a batch one by one
    energies = torch.logspace(0, -6, n, dtype=torch.float64, device=device)
    turned = torch.stack([energies.roll(7 * index) for index in range(count)])
    return (Q * turned[:, None]) @ Q.mT


def pair(M: Tensor) -> Tensor:
    """The F that goes with M."""
    n = M.shape[-1]
    return M.flip(-1, -2).contiguous() + 0.1 / n * torch.eye(n, dtype=M.dtype, device=M.device)


def run(
    kept: dict[str, Any], device: torch.device, solver: str, count: int = 48, n: int = 768, rank: int = 128
) -> list[dict[str, Any]] | None:
    """Rows {solver, ms, excess} of one solver, of all parts where it is "parts"; None where it cannot run.

    `kept` holds the problems from one call to the next.
    """
    if "problems" not in kept:
        M = kept["problems"] = problems(count, n, device)
        kept["best"] = _tail(M, torch.linalg.eigh(M)[1][..., -rank:])
    M = kept["problems"]
    if solver == "parts":
        us = microseconds(_parts(M, pair(M)), [()], device, rounds=3, graphs=False)
        return [{"solver": name, "ms": round(time / 1e3, 3), "excess": None} for name, time in us.items()]
    function, excess = _solver(solver, M, rank, kept["best"])
    if function is None:
        return None
    us = microseconds({solver: function}, [()], device, rounds=2, graphs=False)
    return [{"solver": solver, "ms": round(us[solver] / 1e3, 3), "excess": excess}]


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Solvers that lose what they should not."""
    lost = [row for row in rows if row["excess"] is not None and not abs(row["excess"]) <= bound(row["solver"])]
    return [f"{row['solver']}: its loss is off by {row['excess']:.1e} of the optimal one" for row in lost]


def bound(solver: str) -> float:
    """How much of the optimal loss a solver may lose."""
    return 1e-4 if "fp32" in solver else 1e-6


def _solver(name: str, M: Tensor, rank: int, best: Tensor) -> tuple[Function | None, float]:
    """A solver and its excess loss; none where it cannot run here."""
    if name.endswith("of pairs"):
        solve = _of_pairs(M, pair(M)).get(name)
        if solve is None:
            return None, 0.0
        energies, P, Q = solve()
        least = energies[:, rank:].sum(-1)
        return solve, float(((_loss(M, pair(M), P[..., :rank], Q[:, :rank]) - least) / least).abs().max())
    functions: dict[str, Function] = {
        "loop of torch.linalg.eigh": lambda: [torch.linalg.eigh(matrix) for matrix in M],
        "torch.linalg.eigh, batched": lambda: torch.linalg.eigh(M),
        "solve_batch fp64": lambda: solve_batch(M),
        "solve_batch fp32 with sweeps": lambda: solve_batch(M, precision="fp32"),
        "leading_subspace fp32": lambda: leading_subspace(M, rank),
    }
    if cusolver.why_not(M.device) is None:
        functions["cusolverDnXsyevBatched"] = lambda: eigh(M, "cusolver")
        functions["solve_batch by cuSOLVER"] = lambda: solve_batch(M, eigensolver=lambda K: eigh(K, "cusolver"))
    if name not in functions:
        return None, 0.0
    function = functions[name]
    return function, float(((_tail(M, _basis(name, function(), rank)) - best) / best).max())


def _of_pairs(M: Tensor, F: Tensor) -> dict[str, Function]:
    """Every candidate of `batched_solve` that can run here."""
    key = batched_solve.Key(len(M), M.shape[-1], True, M.dtype, M.device)
    able = [c for c in registry.candidates(batched_solve.OP) if c.supports(key) is None]
    return {f"{candidate.name}, of pairs": lambda run=candidate.run: run(M, F) for candidate in able}


def _parts(M: Tensor, F: Tensor) -> dict[str, Function]:
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
