"""One command that says whether the GPU kernels are right, and how fast: under nine minutes on one GPU, no network.

    python -m bench.gate [--json FILE] [--write-table]      on a GPU: all of it
    python -m bench.gate --compile-only                     anywhere: what needs no GPU
    python -m bench.gate --rehearse                         steps 3 to 5 on a CPU, on tiny shapes
    python -m bench.gate --sanitize                         on a GPU: the CUDA kernels under compute-sanitizer

1. every kernel compiled for sm_80, sm_90 (gfx942 reported): no spill, shared memory, tensor cores, registers; csrc/cuda
   where there is nvcc
2. every kernel and dtype against fp64; red stops here, or with --keep-going leaves out what is wrong
3. times of every kernel against dense cuBLAS, two GEMMs and what torch.compile makes of them
4. a whole ViT-B: eager, as CUDA graph, compiled; throughput and peak memory
5. the batched solve against torch.linalg.eigh
6. JSON under bench/results/, Markdown on stdout. Exit status 0 only if all that has to hold does.

The JSON is written after every step, and a step that raises does not stop the others. `--only` takes some of compile,
correct, kernels, models, solve, for several short runs. `--write-table` keeps the times where dispatch finds them
(vitlr/ops/measured/). Needs torch, Triton, timm, numpy.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("compile", "correct", "kernels", "models", "solve")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="only what needs no GPU")
    parser.add_argument("--rehearse", action="store_true", help="steps 3 to 5 on a CPU, on tiny shapes")
    parser.add_argument("--interpret", action="store_true", help="only correctness, in Triton's interpreter")
    parser.add_argument("--sanitize", action="store_true", help="only memcheck and racecheck of the CUDA kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go (default: bench/results/)")
    parser.add_argument("--write-table", action="store_true", help="keep the times for dispatch")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, separated by commas")
    parser.add_argument("--keep-going", action="store_true", help="time what is right although something is not")
    parser.add_argument("--seconds", type=float, default=500, help="time for all of it")
    given = parser.parse_args()
    unknown = set(given.only.split(",")) - set(STEPS)
    if unknown:
        parser.error(f"--only {given.only}: expected some of {', '.join(STEPS)}")
    _install()
    if given.rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    if given.interpret:
        return _interpret()
    if given.sanitize:
        return _sanitize()
    return _Gate(given).run()


class _Gate:
    """One run: the steps that are wanted, one report that is written after each."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.start = given, time.monotonic()
        self.report: dict[str, Any] = {"benchmark": "gpu_gate", "machine": _machine(), "failures": [], "not_timed": []}
        self.path = given.json
        if self.path is None and not (given.compile_only or given.rehearse):
            self.path = _result_file(self.report)

    def run(self) -> int:
        import torch

        wanted = [step for step in STEPS if step in self.given.only.split(",")]
        if self.given.rehearse:
            wanted = ["kernels", "models", "solve"]
        elif self.given.compile_only:
            wanted = ["compile", "interpreted"]
        elif not torch.cuda.is_available():
            self.report["failures"].append("torch sees no GPU: use --compile-only, or --rehearse to try the script")
            wanted = []
        self.device = torch.device("cpu" if self.given.rehearse else "cuda")
        for step in wanted:
            wrong = [row for row in self.report.get("correct", ()) if row["problem"]]
            if wrong and not self.given.keep_going:
                break
            try:
                getattr(self, step)()
            except Exception as cause:
                traceback.print_exc()
                self.report["failures"].append(f"{step}: {type(cause).__name__}: {str(cause)[:300]}")
            self._save()
        if self.report["not_timed"]:
            print(f"\n{len(self.report['not_timed'])} rows were not timed, {self.report['not_timed'][0]} first")
        for failure in self.report["failures"]:
            print(f"RED: {failure}")
        print(f"{'red' if self.report['failures'] else 'green'} after {self.report.get('seconds', 0):.0f} s")
        return 1 if self.report["failures"] else 0

    def compile(self) -> None:
        from bench.gate import compiled

        _title("Compiled: registers / KB of shared memory")
        rows = self.report["compiled"] = compiled.compile_all()
        self.report["failures"] += compiled.failures(rows)
        print(compiled.table(rows))
        self._compile_cuda()

    def _compile_cuda(self) -> None:
        from bench.gate import cuda

        _title("csrc/cuda, compiled")
        try:
            rows = self.report["cuda"] = cuda.compiled()
        except Exception as cause:  # no nvcc: then nothing of it runs either
            print(f"not compiled: {cause}")
            return
        self.report["failures"] += cuda.failures(rows)
        print(cuda.table(rows))

    def interpreted(self) -> None:
        """Correctness in the interpreter, in a process of its own: one process cannot both interpret and compile."""
        _title("Correct in Triton's interpreter")
        command = [sys.executable, "-m", "bench.gate", "--interpret"]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=ROOT
        )
        print(done.stdout, end="")
        if done.returncode:
            red = [line.removeprefix("RED: ") for line in done.stdout.splitlines() if line.startswith("RED: ")]
            self.report["failures"] += red or [f"the interpreter run failed: {done.stderr[-500:]}"]

    def correct(self) -> None:
        from bench.cases import correctness

        _title("Correct against fp64")
        self.report["correct"] = correctness.check(self.device)
        self.report["failures"] += _told(self.report["correct"])

    def kernels(self) -> None:
        from bench.gate import choice, timings

        _title("Kernels")
        every = timings.rehearsal(self.device) if self.given.rehearse else timings.grid(self.device)
        wrong = frozenset((row["op"], row["candidate"]) for row in self.report.get("correct", ()) if row["problem"])
        rows, left = timings.run(self.device, 0.6 * self._left(), every, wrong)
        self.report["timings"] = rows
        self.report["not_timed"] += left
        print(timings.table(rows))
        if self.given.write_table:
            _write_table(self.report)
        self.report["failures"] += choice.check(self.device, rows)
        worst, where = choice.by_neighbours(rows)
        print(f"\nshapes that were not measured: at worst {worst:.2f}x the best candidate {where}")
        self.report["by_neighbours"] = {"ratio": worst, "where": where}

    def models(self) -> None:
        from bench.gate import models

        _title("ViT-B, bf16")
        options: dict[str, Any] = {"batches": (2,), "shares": (0.4,), "make": _tiny} if self.given.rehearse else {}
        rows, left = models.run(self.device, self.report.get("timings", []), 0.8 * self._left(), **options)
        self.report["models"] = rows
        self.report["not_timed"] += left
        print(models.table(rows))

    def solve(self) -> None:
        from bench.gate import solve

        _title("Batched solve")
        sizes = {"count": 3, "n": 48, "rank": 8} if self.given.rehearse else {}
        self.report["solve"] = solve.run(self.device, **sizes)
        print(solve.table(self.report["solve"]))
        self.report["failures"] += solve.failures(self.report["solve"])
        self.report["captured"] = solve.captured(self.device)
        for row in self.report["captured"]:
            print(f"in a CUDA graph, {row['part']}: {row['problem'] or 'the same'}")
            if row["problem"] and "cuSOLVER" not in row["part"]:  # whose calls are not ours
                self.report["failures"].append(f"in a CUDA graph, {row['part']}: {row['problem']}")

    def _left(self) -> float:
        return self.given.seconds - (time.monotonic() - self.start)

    def _save(self) -> None:
        self.report["seconds"] = round(time.monotonic() - self.start, 1)
        if self.path is not None:
            from bench.common import write_json

            write_json(self.path, self.report)
            print(f"\nfigures: {self.path}", flush=True)


def _install() -> None:
    """Install this checkout where vitlr is not importable from it; no network is needed."""
    spec = importlib.util.find_spec("vitlr")
    here = spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent == ROOT / "vitlr"
    if here and importlib.util.find_spec("vitlr.triton_kernels") is not None:
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    # CPU kernels are not for here; CUDA kernels are built where there is nvcc, unless somebody brought them along.
    built = list((ROOT / "vitlr").glob("_cuda.*.so")) or shutil.which("nvcc") is None
    subprocess.run(command, check=True, env={**os.environ, **({"VITLR_SKIP_NATIVE_BUILD": "1"} if built else {})})
    os.execv(sys.executable, [sys.executable, *sys.argv])  # so that the fresh install is found


def _machine() -> dict[str, Any]:
    import torch
    import triton

    from bench.common import machine

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**machine(), "gpu": card, "cuda": torch.version.cuda, "triton": triton.__version__}


def _interpret() -> int:
    import torch

    from bench.cases import correctness

    rows = correctness.check(torch.device("cpu"))
    return 1 if _told(rows) else 0


def _sanitize() -> int:
    from bench.gate import cuda

    found = cuda.sanitize()
    for failure in found:
        print(f"RED: {failure}")
    return 1 if found else 0


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


def _tiny() -> Any:
    from vitlr.checkpoint.creation import create_model

    return create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5)


def _write_table(report: dict[str, Any]) -> None:
    from bench.common import write_json
    from vitlr.ops.dispatch import measured

    rows = [{name: row[name] for name in ("op", "key", "us")} for row in report["timings"]]
    for row, timed in zip(rows, report["timings"], strict=True):
        row["us"] = {name: us for name, us in row["us"].items() if name in timed["candidates"]}
    facts = report["machine"]
    name = facts["gpu"] or "rehearsal"
    body = {"device": name, "date": facts["date"], "torch": facts["torch"], "rows": rows}
    write_json(measured.FOLDER / f"{measured.file_name(name)}.json", body)


def _result_file(report: dict[str, Any]) -> Path:
    from vitlr.ops.dispatch import measured

    facts = report["machine"]
    return ROOT / "bench" / "results" / f"gpu_gate_{measured.file_name(facts['gpu'] or 'none')}_{facts['date']}.json"


def _title(text: str) -> None:
    print(f"\n## {text}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
