"""Time the symmetric eigenproblems of a whole model: one by one, as a batch, and by products alone.

    python -m bench.micro.solve [--n 768] [--batch 48] [--ranks 128,256] [--device cuda] [--repeats 5] [--json FILE]

The default is 48 problems of n = 768 (ViT-B) on a GPU, 8 of n = 192 (ViT-Ti) on a CPU. The spectra decay as those of
`tests/spectra_cases.py` do. Before any timing, every solver's loss is held against fp64's. On a GPU the batched call of
cuSOLVER is timed too where it is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from bench.common import ROOT, finish, parser

sys.path.insert(0, str(Path(ROOT) / "tests"))
import spectra_cases

from vitlr.measuring.timing import compare
from vitlr.ops.backends import cusolver
from vitlr.ops.linalg.eigenproblems import solve, solve_batch
from vitlr.ops.linalg.eigh import eigh
from vitlr.ops.linalg.subspace import leading_subspace


def problems(batch: int, n: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """M and F [batch, n, n], mild and outlier cases in turn."""
    pairs = [spectra_cases.case(("mild", "outlier")[i % 2], n, seed=i) for i in range(min(batch, 4))]
    M = torch.stack([C for _, C in pairs])
    F = torch.stack([W.mT @ W for W, _ in pairs])
    turns = torch.arange(batch) % len(pairs)
    return M[turns].to(device), F[turns].to(device)


def check(K: torch.Tensor, ranks: list[int]) -> dict[str, float]:
    """The largest excess loss of `leading_subspace` and of the fp32 path, relative to the optimal loss."""
    few = K[:2]
    worst = {}
    for rank in ranks:
        U = leading_subspace(few, rank)[1].cpu()
        worst[f"subspace {rank}"] = max(spectra_cases.excess(k, u, rank) for k, u in zip(few.cpu(), U, strict=True))
        U = solve_batch(few, precision="fp32")[1].cpu()
        worst[f"fp32 {rank}"] = max(spectra_cases.excess(k, u, rank) for k, u in zip(few.cpu(), U, strict=True))
    return worst


def main() -> None:
    args = parser(__doc__ or "")
    gpu = torch.cuda.is_available()
    args.add_argument("--device", default="cuda" if gpu else "cpu", help="cpu or cuda")
    args.add_argument("--n", type=int, help="size of the matrices; default 768 on a GPU, 192 on a CPU")
    args.add_argument("--batch", type=int, help="how many; default 48 on a GPU, 8 on a CPU")
    args.add_argument("--ranks", help="ranks of leading_subspace; default 128,256 or n / 6, n / 3")
    args.add_argument("--repeats", type=int, default=5, help="rounds")
    given = args.parse_args()
    torch.set_num_threads(given.threads)
    large = given.device != "cpu"
    n, batch = given.n or (768 if large else 192), given.batch or (48 if large else 8)
    ranks = [int(r) for r in given.ranks.split(",")] if given.ranks else [n // 6, n // 3]
    M, F = problems(batch, n, given.device)
    L = torch.linalg.cholesky(F + 1e-12 * torch.eye(n, dtype=F.dtype, device=F.device))
    K = L.mT @ M @ L
    K = (K + K.mT) / 2

    lost = check(K, ranks)
    if max(lost.values()) > 4e-5:
        raise SystemExit(f"a solver loses more than 4e-5 of the optimal loss ({lost}); nothing is timed")

    functions = {
        "eigh loop": lambda: [torch.linalg.eigh(k) for k in K],
        "eigh batch": lambda: eigh(K, "torch"),
        "solve loop": lambda: [solve(m, f) for m, f in zip(M, F, strict=True)],
        "solve_batch": lambda: solve_batch(M, F),
        "solve_batch fp32": lambda: solve_batch(M, F, precision="fp32"),
    }
    for rank in ranks:
        functions[f"leading_subspace {rank}"] = lambda rank=rank: leading_subspace(K, rank)
    refusal = cusolver.why_not(K.device)
    if refusal is None:
        functions["cuSOLVER batch"] = lambda: eigh(K, "cusolver")
    else:
        print(f"cuSOLVER's batched call is left out: {refusal}")
    times = compare(functions, repeats=given.repeats, warmup=1, device=given.device)
    loop = times["eigh loop"].min
    print(f"{batch} problems of n = {n} on {given.device}, fp64")
    for name, t in times.items():
        print(f"{name:<24} min {1e3 * t.min:9.1f} ms   median {1e3 * t.median:9.1f} ms   loop / it {loop / t.min:6.2f}")
    results = {
        "n": n,
        "batch": batch,
        "device": torch.cuda.get_device_name() if large else "cpu",
        "excess loss": lost,
        "ms": {name: round(1e3 * t.min, 3) for name, t in times.items()},
        "eigh loop / it": {name: round(loop / t.min, 4) for name, t in times.items()},
    }
    finish("solve", results, given.json)


if __name__ == "__main__":
    main()
