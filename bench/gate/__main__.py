"""Whether the GPU kernels are right and how fast, in two short windows on one GPU, with no network and nothing to lose.

    python bench/gpu_gate.py --window 1 --out DIR                  on a GPU: what is right, the first times
    python bench/gpu_gate.py --window 2 --out DIR --after FILE     on a GPU: the rest, knowing window 1's lines
    python bench/gpu_gate.py --report FILE [--out DIR]             anywhere: tables and dispatch's times from the lines
    python bench/gpu_gate.py --plan                                anywhere: the seconds planned for both windows
    python bench/gpu_gate.py --rehearse [--out DIR]                anywhere: both windows in miniature, with faults
    python bench/gpu_gate.py --compile-only [--json FILE]          anywhere: what needs no GPU
    python bench/gpu_gate.py --sanitize                            on a GPU: the CUDA kernels under compute-sanitizer

Everything that a window finds is a line in DIR/window1.jsonl or DIR/window2.jsonl as soon as it is known, whatever
kills the gate then. `--after` may also be the lines of the same window, cut short: it goes on behind them. Exit status
0 only if all that has to hold does. Needs torch, Triton, timm, numpy.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

START = time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--window", type=int, choices=(1, 2), help="one of the two runs on a GPU")
    what.add_argument("--report", type=Path, metavar="FILE", help="tables from the lines of a window")
    what.add_argument("--plan", action="store_true", help="the seconds planned for both windows")
    what.add_argument("--compile-only", action="store_true", help="only what needs no GPU")
    what.add_argument("--interpret", action="store_true", help="only correctness, in Triton's interpreter")
    what.add_argument("--sanitize", action="store_true", help="only memcheck and racecheck of the CUDA kernels")
    parser.add_argument("--rehearse", action="store_true", help="in miniature on a CPU, with faults put in on purpose")
    parser.add_argument("--seed", type=int, default=0, help="of the second at which the rehearsal kills the gate")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where everything is written")
    parser.add_argument("--after", type=Path, metavar="FILE", help="lines of the run before")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --compile-only: the figures")
    given = parser.parse_args()
    if given.rehearse or given.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    os.environ.setdefault(
        "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
    )  # to ask for a GPU must not touch CUDA: workers are forked
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # rivals have one kernel each: a pool starts for longer
    if given.window and given.out is None:
        parser.error("--window needs --out DIR")
    if given.after is not None and not given.after.is_file():
        parser.error(f"--after {given.after}: no such file")
    from bench.gate import prepare

    prepare.link_kernels()
    return _run(given, parser)


def _run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if given.window:
        return _window(given)
    if given.report is not None:
        from bench.gate import report

        if not given.report.is_file():
            parser.error(f"--report {given.report}: no such file")
        written = report.write(given.report, given.out)
        print(written[0].read_text())
        print("\n".join(f"written: {path}" for path in written))
        return 0
    if given.compile_only or given.interpret:
        from bench.gate import anywhere

        return _told(anywhere.interpret() if given.interpret else anywhere.run(given.json))
    if given.sanitize:
        from bench.gate import sanitize

        red, remarks = sanitize.sanitize()
        print("\n".join(f"racecheck remarks, which decides nothing: {remark}" for remark in remarks))
        return _told(red)
    if given.rehearse:
        from bench.gate import rehearsal

        with tempfile.TemporaryDirectory() as folder:
            return _told(rehearsal.rehearse(given.out or Path(folder), given.seed))
    if given.plan:
        print(_plans())
        return 0
    parser.error("expected one of --window, --report, --plan, --rehearse, --compile-only, --sanitize")


def _window(given: argparse.Namespace) -> int:
    import torch

    from bench.gate import faults, lines, plan, rehearsal, report, tasks
    from bench.gate.run import run

    device = torch.device("cpu" if given.rehearse else "cuda")
    if given.rehearse:
        faults.register()
        window = rehearsal.window(given.window)
    else:
        window = (plan.window_one, plan.window_two)[given.window - 1](device)
    print(tasks.table(window), flush=True)
    path = run(window, given.window, given.out, given.after, device, START)
    found = lines.read(path)
    written = report.write(path, given.out)
    print("\n".join(f"written: {one}" for one in (path, *written)), flush=True)
    return _told(report.red(found))


def _plans() -> str:
    import torch

    from bench.gate import plan, tasks

    device = torch.device("cuda")
    return "\n\n".join(tasks.table(window(device)) for window in (plan.window_one, plan.window_two))


def _told(failures: list[str]) -> int:
    for failure in failures:
        print(f"RED: {failure}")
    print("red" if failures else "green", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
