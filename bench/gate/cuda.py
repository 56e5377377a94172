"""The gate's part for csrc/cuda: what ptxas says of every kernel, and compute-sanitizer over every CUDA candidate.

python -m bench.gate --sanitize       on a GPU, with compute-sanitizer of the CUDA toolkit: memcheck and racecheck
compute-sanitizer --tool memcheck --error-exitcode 9 python bench/cuda.py      the same by hand
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck")
PLACES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


def compiled() -> list[dict[str, Any]]:
    """One row a kernel and target: source, kernel, target, registers, spilled, shared. Raises where nvcc is missing."""
    sys.path.insert(0, str(ROOT / "csrc"))
    nvcc = importlib.import_module("nvcc")
    archs = nvcc.architectures()
    names = [name for name in nvcc.sources(archs) if name.endswith(".cu")]
    return [
        {"source": made.source, "kernel": _short(r.kernel), "target": r.target, "registers": r.registers}
        | {"spilled": r.spilled, "shared": r.shared}
        for made in nvcc.compile_all(names, archs)
        for r in nvcc.resources(made.log)
    ]


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Kernels that spill."""
    return [f"{r['kernel']} on {r['target']}: {r['spilled']} bytes spilled" for r in rows if r["spilled"]]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| source | kernel | target | registers | spilled |", "|---|---|---|---|---|"]
    cells = (
        f"| {Path(r['source']).name} | {r['kernel']} | {r['target']} | {r['registers']} | {r['spilled']} |"
        for r in rows
    )
    return "\n".join([*lines, *cells])


def _short(mangled: str) -> str:
    """A kernel's name as people read it, where c++filt is there."""
    tool = shutil.which("c++filt")
    if tool is None:
        return mangled
    text = subprocess.run([tool, mangled], capture_output=True, text=True).stdout.strip()
    return text.replace("vitlr::cuda::", "").replace("(anonymous namespace)::", "").partition("(")[0] or mangled


def sanitize() -> list[str]:
    """Every CUDA candidate under each tool, in a process of its own; what was found, or why it could not be asked."""
    tool = next(filter(None, map(shutil.which, PLACES)), None)
    if tool is None:
        return ["compute-sanitizer is not installed; it comes with the CUDA toolkit"]
    if not torch.cuda.is_available():
        return ["torch sees no GPU"]
    found = []
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", "bench.gate.cuda"]
        # Blocks that torch cuts from its large ones have no bounds that memcheck could see.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        print(done.stdout[-4000:], end="")
        if done.returncode:
            found.append(f"{name}: exit status {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
    return found


def runs(device: torch.device) -> Iterator[tuple[str, Any]]:
    """Every CUDA candidate that can run here, by name, on small ragged shapes."""
    from bench.cases import calls, correctness
    from vitlr.ops.backends import cuda_solve

    chains = [calls.chain(2, m, k, torch.float64, device) for m, k in ((1, 5), (70, 133), (300, 64))]
    for dtype in (torch.bfloat16, torch.float16):
        for call in (*correctness.small(device, dtype), *chains):
            args = call.make(0)
            for name, run in call.candidates(args).items():
                if name.startswith("cuda"):
                    yield f"{call.op} {name} {call.label}", lambda run=run, args=args: run(*args)
    for n in (1, 130, 200):
        X = calls.Random(n, torch.float64, device)(2, n, n)
        F, level = X @ X.mT / n, torch.full((2,), 1e-3, dtype=torch.float64, device=device)
        factor = cuda_solve.cholesky(F, level)
        yield f"cholesky n={n}", lambda F=F, level=level: cuda_solve.cholesky(F, level)
        yield f"congruence n={n}", lambda factor=factor, F=F: cuda_solve.congruence(factor.L, F)
        yield f"projectors n={n}", lambda factor=factor, X=X: cuda_solve.projectors(factor, X)


def main() -> None:
    """Run them all once, for whoever watches."""
    device = torch.device("cuda")
    for name, run in runs(device):
        run()
        torch.cuda.synchronize()
        print(f"ran {name}", flush=True)


if __name__ == "__main__":
    main()
