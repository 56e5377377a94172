"""compute-sanitizer over the CUDA kernels: tiles and clusters of cuda.sm90, several items a CTA, bytes.

python -m bench.gate --sanitize      on a GPU, with compute-sanitizer of the CUDA toolkit
compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.gate.sanitize      the same by hand

memcheck decides. racecheck only remarks: it does not see that an mbarrier orders the ring's copies and products.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.cases import byte_calls, calls
from bench.common import ROOT
from bench.gate.checks import CLUSTERS, HIDDEN, ITEMS, LINEARS, TILES
from vitlr.ops.backends import cuda, cuda_bytes, cuda_mlp, cuda_solve
from vitlr.ops.dispatch import registry

TOOLS = ("memcheck", "racecheck")
DECIDES = "memcheck"
PLACES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
SECONDS = 240.0


def sanitize() -> tuple[list[str], list[str]]:
    """What memcheck found, or why it could not be asked; and what racecheck remarks."""
    tool = next(filter(None, map(shutil.which, PLACES)), None)
    if tool is None:
        return ["compute-sanitizer is not installed; it comes with the CUDA toolkit"], []
    if not torch.cuda.is_available():
        return ["torch sees no GPU"], []
    found: dict[str, list[str]] = {name: [] for name in TOOLS}
    # Blocks that torch cuts from its large ones have no bounds that memcheck could see.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", "bench.gate.sanitize"]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS)
        except subprocess.TimeoutExpired as cause:
            said = (cause.stdout or b"").decode(errors="replace")
            found[name].append(f"{name}: not over after {SECONDS:.0f} s: {said[-300:]}")
            continue
        print(done.stdout[-4000:], end="")
        if done.returncode:
            found[name].append(f"{name}: exit status {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
    return found[DECIDES], [one for name in TOOLS if name != DECIDES for one in found[name]]


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every CUDA kernel that can run here, by name."""
    for dtype in (torch.bfloat16, torch.float16):
        for plan, shape in (*TILES, *CLUSTERS, *ITEMS):
            args = calls.mlp(*shape, dtype, device, residual=True).make(0)
            yield f"cuda.sm90 {plan} {shape} {dtype}", partial(cuda.run_mlp, *args, plan=plan)
        for plan, shape in LINEARS:
            args = calls.linear(*shape, dtype, device, "gelu", residual=True).make(0)
            yield f"cuda.cluster {plan} {shape} {dtype}", partial(cuda.run_linear, *args, plan=plan)
    for M, widths in ((197, (224, 400, 48)), (390, (768, 144, 48)), (1, (16, 32, 16))):
        bytes_ = byte_calls.fp8_chain(M, widths, ("gelu", "none"), torch.bfloat16, device)
        yield f"cuda.bytes {bytes_.label}", partial(cuda_bytes.run, *bytes_.make(0))
    for M, widths in ((1, (16, 32, 16, 16)), (1000, (224, 400, 48, 80)), (1000, (192, 3072, 256, 768))):
        mlp = byte_calls.fp8_chain(M, widths, HIDDEN, torch.bfloat16, device, residual=True)
        yield f"cuda.mlp {mlp.label}", partial(cuda_mlp.run, *mlp.make(0))
    for m, k in ((1, 5), (70, 133), (300, 64)):
        call = calls.chain(2, m, k, torch.float64, device)
        run = {c.name: c.run for c in registry.candidates(call.op)}["cuda.tensor_cores"]
        yield f"cuda.tensor_cores {call.label}", partial(run, *call.make(0))
    for n in (1, 130, 200):
        X = calls.Random(n, torch.float64, device)(2, n, n)
        F, level = X @ X.mT / n, torch.full((2,), 1e-3, dtype=torch.float64, device=device)
        factor = cuda_solve.cholesky(F, level)
        yield f"cholesky n={n}", partial(cuda_solve.cholesky, F, level)
        yield f"congruence n={n}", partial(cuda_solve.congruence, factor.L, F)
        yield f"projectors n={n}", partial(cuda_solve.projectors, factor, X)


def main() -> None:
    """Run them all once, for whoever watches."""
    device = torch.device("cuda")
    for name, run in cases(device):
        run()
        torch.cuda.synchronize()
        print(f"ran {name}", flush=True)


if __name__ == "__main__":
    main()
