"""The part of the gate that needs no GPU: every kernel compiled, its bounds held, values checked in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import correctness
from bench.common import ROOT, machine, write_json
from bench.gate import compiled, cuda

Rows = list[dict[str, Any]]


def run(path: Path | None) -> list[str]:
    """Compile and interpret; the failures. The figures go to `path`."""
    report: dict[str, Any] = {"benchmark": "gpu_gate", "machine": machine(), "failures": []}
    print("\n## Compiled: registers / KB of shared memory\n", flush=True)
    report["compiled"] = compiled.compile_all()
    report["failures"] += compiled.failures(report["compiled"])
    print(compiled.table(report["compiled"]))
    print("\n## csrc/cuda, compiled\n", flush=True)
    try:
        report["cuda"] = cuda.compiled()
        report["failures"] += cuda.failures(report["cuda"])
        print(cuda.table(report["cuda"]))
    except Exception as cause:  # no nvcc: then nothing of it runs either
        print(f"not compiled: {cause}")
    print("\n## Correct in Triton's interpreter\n", flush=True)
    report["failures"] += _interpreted()
    if path is not None:
        write_json(path, report)
        print(f"\nfigures: {path}", flush=True)
    return report["failures"]


def _interpreted() -> list[str]:
    """Correctness in a process of its own: one process cannot both interpret and compile."""
    command, environment = [sys.executable, "-m", "bench.gate", "--interpret"], {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout, end="")
    red = [line.removeprefix("RED: ") for line in done.stdout.splitlines() if line.startswith("RED: ")]
    return (red or [f"the interpreter run failed: {done.stderr[-500:]}"]) if done.returncode else []


def interpret() -> list[str]:
    """Every kernel in the interpreter of this process: how many checks held, by op and candidate; the failures."""
    rows: Sequence[dict[str, Any]] = correctness.interpreted()
    for name in dict.fromkeys(f"{row['op']} {row['candidate']}" for row in rows):
        these = [row for row in rows if f"{row['op']} {row['candidate']}" == name]
        held = sum(row["problem"] is None for row in these)
        print(f"{name}: {held} of {len(these)} right")
    return [f"{r['op']} {r['candidate']} {r['call']}: {r['problem']}" for r in rows if r["problem"]]
