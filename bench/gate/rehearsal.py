"""Both windows on a CPU, in Triton's interpreter, on tiny shapes, with every fault put in on purpose.

A supervisor does window 1 and is killed at a random second; a second one goes on from its lines and does both to the
end. Then everything is asked for: each fault by its name and nothing of it timed or chosen, every other task with its
result, no process left over, and a report from the lines alone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.cases import byte_calls, calls
from bench.cases.calls import Call
from bench.common import ROOT
from bench.gate import lines, report
from bench.gate.checks import LINEAR, MLP, check
from bench.gate.faults import FAULTS
from bench.gate.lines import Line
from bench.gate.plan import row
from bench.gate.run import file_of
from bench.gate.tasks import Group, Phase, Task, Window

CPU = torch.device("cpu")
FP32, FP16 = torch.float32, torch.float16


def window(number: int) -> Window:
    """A window in miniature: the same kinds of tasks, phases, lanes and deadlines."""
    return _first() if number == 1 else _second()


def _linear(M: int, dtype: torch.dtype = FP32) -> Call:
    return calls.linear(M, 32, 48, 16, dtype, CPU)


def _bytes() -> Call:
    return byte_calls.fp8_chain(20, (32, 16, 40, 16, 32), ("none", "gelu", "none", "none"), FP32, CPU, True, True)


def _first() -> Window:
    mlp, chain = calls.mlp(20, 32, 40, 32, 16, 16, FP32, CPU), calls.chain(2, 24, 40, FP32, CPU)
    whole = {"images": 4, "batch": 2, "make": _tiny}
    right = [
        Group("linear", [check(_linear(M, dtype), "triton.row_block") for M in (17, 33) for dtype in (FP32, FP16)]),
        Group("mlp", [check(mlp, "triton.row_block")]),
        Group("chain", [check(chain, "triton.chain")]),
        Group("bytes", [check(_bytes(), "triton.bytes")]),
        Group("whole", [Task("whole", "calibration and plan", given=whole, deadline=60)]),
    ]
    early = [name for name in FAULTS if name != "fault.hangs_later"]  # that one is right until it is timed
    wrong = [Group(name, [check(_linear(M), name) for M in (17, 18, 33)]) for name in early if name != "fault.hangs"]
    wrong.append(Group("fault.hangs", [_until(3.0, check(_linear(M), "fault.hangs")) for M in (17, 18, 33)]))
    rivals = ("dense", "dense epilogue", "torch epilogue")
    timed = [
        row(mlp, "mlp", rivals),
        row(_bytes(), "mlp", ("dense", "four epilogue")),
        _until(10.0, row(_linear(33), "linear", ("dense",))),
    ]
    ceilings = Group("ceilings", [Task("ceilings", "copy and product", anew=True)])
    return Window(
        "rehearsed window 1",
        [
            Phase("ceilings", 30, lambda found: [ceilings]),
            Phase("checks", 150, lambda found: [*right, *wrong], lanes=3),
            Phase("times", 60, lambda found: [Group("times", timed)]),
        ],
    )


def _until(deadline: float, task: Task) -> Task:
    """A task in which somebody hangs on purpose, with a deadline that is short, and long for whoever does not."""
    return replace(task, deadline=deadline)


def _second() -> Window:
    mlp = calls.mlp(24, 32, 40, 32, 16, 16, FP32, CPU)
    rivals = ("dense", "dense epilogue", "torch epilogue", "dense compiled", "torch compiled")
    compiles = [
        Task("compile", f"{name}, {mlp.label}", MLP, name, "float32", {"call": mlp, "rival": name}, 60)
        for name in rivals[3:]
    ]
    tiny = {"batch": 2, "make": _tiny}
    models = [
        Task("model", f"{plan} batch 2 {mode}", given={"plan": plan, "mode": mode, **tiny}, deadline=60)
        for plan, mode in PLANS
    ]
    sizes = {"count": 3, "n": 48, "rank": 8}
    solvers = [
        Task("solve", name, "batched_solve", name, "float64", {"solver": name, **sizes})
        for name in ("torch.linalg.eigh, batched", "solve_batch fp64", "torch, of pairs", "cuda.fused, of pairs")
    ]
    return Window(
        "rehearsed window 2",
        [
            Phase("precompile", 60, lambda found: [Group("compile", compiles)]),
            Phase("MLPs", 60, lambda found: [Group("MLPs", [row(mlp, "mlp", rivals)])]),
            Phase("models", 60, lambda found: [Group("models", models)]),
            Phase("solve", 30, lambda found: [Group("solve", solvers)]),
            Phase("choice", 30, lambda found: [Group("choice", [Task("choice", "of every row")])]),
        ],
    )


PLANS = (
    ("ranks 8", "graph"),
    ("params:60%", "graph"),
    ("joint params:60%", "graph"),
    ("joint params:60%", "compiled"),
)


def _tiny() -> torch.nn.Module:
    from vitlr.checkpoint.creation import create_model

    return create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=64, num_heads=2, depth=1, num_classes=5
    )


def rehearse(out: Path, seed: int = 0) -> list[str]:
    """All of it; what did not come out as it should."""
    killed = out / "killed"
    missing = _killed(killed, random.Random(seed).uniform(0.5, 6.0))
    first, second = out / "one", out / "two"
    _gate(["--window", "1", "--out", str(first), "--after", str(file_of(killed, 1))]).wait()
    _gate(["--window", "2", "--out", str(second), "--after", str(file_of(first, 1))]).wait()
    found = lines.read(file_of(second, 2))
    missing += _unnamed(found) + _incomplete(found) + _used(found)
    written = report.write(file_of(second, 2), out)
    missing += [] if all(path.is_file() for path in written) else ["the report is not there"]
    return missing


def _gate(arguments: Sequence[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "bench.gate", "--rehearse", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"})


def _killed(out: Path, after: float) -> list[str]:
    """Kill a supervisor some seconds after it began; whom it left behind."""
    gate = _gate(["--window", "1", "--out", str(out)])
    while not lines.read(file_of(out, 1)) and gate.poll() is None:
        time.sleep(0.05)
    time.sleep(after)
    gate.send_signal(signal.SIGKILL)
    missing = [] if gate.wait() == -signal.SIGKILL else ["the supervisor was over before it could be killed"]
    time.sleep(0.5)
    found = lines.read(file_of(out, 1))
    left = {line["pid"] for line in found if line["what"] == "start" and _alive(line["pid"])}
    count = len(lines.results(found))
    print(f"the supervisor was killed {after:.1f} s after it began, with {count} results on disk", flush=True)
    return missing + [f"worker {pid} outlived its supervisor" for pid in sorted(left)]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _unnamed(found: Sequence[Line]) -> list[str]:
    """Faults that were not found, or not by their name."""
    told = []
    for name, (_, fault, detail) in FAULTS.items():
        these = [line for line in lines.faults(found) if line["candidate"] == name]
        print(f"{name}: " + "; ".join(f"{line['fault']} ({line['detail'][:70]})" for line in these))
        if not any(line["fault"] == fault and detail in line["detail"] for line in these):
            told.append(f"{name} was to be named {fault} with {detail!r}, found {these}")
    others = {line["candidate"] for line in lines.faults(found)} - set(FAULTS)
    return told + [f"{name} did nothing wrong and was blamed" for name in others]


def _incomplete(found: Sequence[Line]) -> list[str]:
    """Tasks that should have a result and have none, and lines left that should not be."""
    done = lines.results(found)
    told = []
    for number in (1, 2):
        for phase in window(number).phases:
            for task in (task for group in phase.groups(()) for task in group.tasks):
                stopped = (task.op, task.candidate) in lines.stopped(found)
                if task.id not in done and not stopped:
                    told.append(f"{task.id} has no result")
                if task.id in done and done[task.id].get("fault") and task.candidate not in FAULTS:
                    told.append(f"{task.id}: {done[task.id]['fault']}, {done[task.id]['detail']}")
    ends = {"fault.hangs", "fault.aborts", "fault.segfaults", "fault.sticky"}
    if ends != {name for _, name in lines.stopped(found)}:
        told.append(f"two deaths stopped {sorted(lines.stopped(found))}, expected {sorted(ends)}")
    return told


def _used(found: Sequence[Line]) -> list[str]:
    """Where a candidate with a fault was timed or chosen after all; and rows without one that was right."""
    told = [one for one in report.red(found) if one.startswith("model ")]
    for line in lines.results(found).values():
        text = json.dumps(line.get("value"))
        if line["kind"] in ("row", "choice") and "fault." in text:
            told.append(f"{line['id']} uses what failed: {text}")
        if line["kind"] == "row" and "triton." not in text:
            told.append(f"{line['id']} has no time of a kernel: {text}")
    bad = lines.excluded(found)
    return told + [f"{name} is not excluded" for name in FAULTS if (LINEAR, name, "float32") not in bad]
