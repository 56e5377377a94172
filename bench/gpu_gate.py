"""One command that says whether the GPU kernels are right, and how fast: under nine minutes on one GPU, no network.

    python bench/gpu_gate.py [--json FILE] [--write-table]      on a GPU: all of it
    python bench/gpu_gate.py --compile-only                     anywhere: what needs no GPU
    python bench/gpu_gate.py --rehearse                         steps 3 to 5 on a CPU, on tiny shapes

1. every kernel compiled for sm_80, sm_90 (gfx942 reported): no spill, shared memory, tensor cores, registers
2. every kernel and dtype against fp64; red stops here
3. times of every kernel against dense cuBLAS, two GEMMs and what torch.compile makes of them
4. a whole ViT-B: eager, as CUDA graph, compiled; throughput and peak memory
5. the batched solve against torch.linalg.eigh
6. JSON under bench/results/, Markdown on stdout. Exit status 0 only if all that has to hold does.

`--write-table` keeps the times where dispatch finds them (vitlr/ops/measured/). Needs torch, Triton, timm, numpy.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="only what needs no GPU")
    parser.add_argument("--rehearse", action="store_true", help="steps 3 to 5 on a CPU, on tiny shapes")
    parser.add_argument("--interpret", action="store_true", help="only correctness, in Triton's interpreter")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go (default: bench/results/)")
    parser.add_argument("--write-table", action="store_true", help="keep the times for dispatch")
    parser.add_argument("--seconds", type=float, default=520, help="time for all of it")
    given = parser.parse_args()
    _install()
    if given.rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    if given.interpret:
        return _interpret(given.json)
    start = time.monotonic()
    report: dict[str, Any] = {"benchmark": "gpu_gate", "machine": _machine(), "failures": []}
    if not given.rehearse:
        _compile(report)
    if given.compile_only:
        _interpreted(report)
    else:
        _on_device(report, given, start)
    report["seconds"] = round(time.monotonic() - start, 1)
    path = given.json or (None if given.compile_only or given.rehearse else _result_file(report))
    if path is not None:
        from _common import write_json

        write_json(path, report)
        print(f"\nfigures: {path}")
    for failure in report["failures"]:
        print(f"RED: {failure}")
    print(f"{'red' if report['failures'] else 'green'} after {report['seconds']:.0f} s")
    return 1 if report["failures"] else 0


def _install() -> None:
    """Install this checkout where vitlr is not importable from it; no network is needed."""
    spec = importlib.util.find_spec("vitlr")
    here = spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent == ROOT / "vitlr"
    if here and importlib.util.find_spec("vitlr.triton_kernels") is not None:
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    subprocess.run(command, check=True)
    os.execv(sys.executable, [sys.executable, *sys.argv])  # so that the fresh install is found


def _machine() -> dict[str, Any]:
    import torch
    import triton
    from _common import machine

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**machine(), "gpu": card, "cuda": torch.version.cuda, "triton": triton.__version__}


def _compile(report: dict[str, Any]) -> None:
    import gate_compile

    _title("Compiled: registers / KB of shared memory")
    rows = gate_compile.compile_all()
    report["compiled"] = rows
    report["failures"] += gate_compile.failures(rows)
    print(gate_compile.table(rows))


def _interpreted(report: dict[str, Any]) -> None:
    """Correctness in the interpreter, in a process of its own: one process cannot both interpret and compile."""
    _title("Correct in Triton's interpreter")
    command = [sys.executable, __file__, "--interpret"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    print(done.stdout, end="")
    if done.returncode:
        red = [line.removeprefix("RED: ") for line in done.stdout.splitlines() if line.startswith("RED: ")]
        report["failures"] += red or [f"the interpreter run failed: {done.stderr[-500:]}"]


def _interpret(path: Path | None) -> int:
    import gate_correctness
    import torch

    rows = gate_correctness.check(torch.device("cpu"))
    return 1 if _told(rows) else 0


def _told(rows: list[dict[str, Any]]) -> list[str]:
    """Print how many checks held, by op and candidate; the failures."""
    for name in dict.fromkeys(f"{row['op']} {row['candidate']}" for row in rows):
        these = [row for row in rows if f"{row['op']} {row['candidate']}" == name]
        held = sum(row["problem"] is None for row in these)
        print(f"{name}: {held} of {len(these)} right")
    failures = [f"{r['op']} {r['candidate']} {r['call']}: {r['problem']}" for r in rows if r["problem"]]
    for failure in failures:
        print(f"RED: {failure}")
    return failures


def _on_device(report: dict[str, Any], given: argparse.Namespace, start: float) -> None:
    import gate_choice
    import gate_correctness
    import gate_models
    import gate_solve
    import gate_timings
    import torch

    if not given.rehearse and not torch.cuda.is_available():
        report["failures"].append("torch sees no GPU: use --compile-only, or --rehearse to try the script")
        return
    device = torch.device("cpu" if given.rehearse else "cuda")

    def left() -> float:
        return given.seconds - (time.monotonic() - start)

    if not given.rehearse:
        _title("Correct against fp64")
        report["correct"] = gate_correctness.check(device)
        report["failures"] += _told(report["correct"])
    if report["failures"]:
        return
    _title("Kernels")
    every = gate_timings.rehearsal(device) if given.rehearse else gate_timings.grid(device)
    report["timings"], late = gate_timings.run(device, 0.5 * left(), every)
    report["failures"] += gate_choice.check(device, report["timings"])
    print(gate_timings.table(report["timings"]))
    worst, where = gate_choice.by_neighbours(report["timings"])
    print(f"\nshapes that were not measured: at worst {worst:.2f}x the best candidate {where}")
    report["by_neighbours"] = {"ratio": worst, "where": where}
    _title("ViT-B, bf16")
    options: dict[str, Any] = {"batches": (2,), "shares": (0.4,), "make": _tiny} if given.rehearse else {}
    report["models"], later = gate_models.run(device, report["timings"], 0.8 * left(), **options)
    print(gate_models.table(report["models"]))
    _title("Batched solve")
    report["solve"] = gate_solve.run(device, **({"count": 3, "n": 48, "rank": 8} if given.rehearse else {}))
    print(gate_solve.table(report["solve"]))
    report["not_timed"] = [*late, *later]
    if report["not_timed"]:
        print(f"\nno time was left for {len(report['not_timed'])} rows, {report['not_timed'][0]} first")
    if given.write_table:
        _write_table(report)


def _tiny() -> Any:
    from vitlr.models import create_model

    return create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5)


def _write_table(report: dict[str, Any]) -> None:
    from _common import write_json

    from vitlr.ops import _measured

    rows = [{name: row[name] for name in ("op", "key", "us")} for row in report["timings"]]
    for row, timed in zip(rows, report["timings"], strict=True):
        row["us"] = {name: us for name, us in row["us"].items() if name in timed["candidates"]}
    facts = report["machine"]
    name = facts["gpu"] or "rehearsal"
    body = {"device": name, "date": facts["date"], "torch": facts["torch"], "rows": rows}
    write_json(_measured.FOLDER / f"{_measured.file_name(name)}.json", body)


def _result_file(report: dict[str, Any]) -> Path:
    from vitlr.ops import _measured

    facts = report["machine"]
    return ROOT / "bench" / "results" / f"gpu_gate_{_measured.file_name(facts['gpu'] or 'none')}_{facts['date']}.json"


def _title(text: str) -> None:
    print(f"\n## {text}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
