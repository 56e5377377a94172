"""Which plans and tiles are the fastest: of the CUDA kernel by force, of a Triton kernel by its own search."""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any

from bench.cases.calls import Call
from bench.cases.clock import in_turns, input_sets, prepared
from bench.cases.correctness import judge, references
from bench.gate import lines
from bench.gate.candidates import runner, why_not
from bench.gate.tasks import Task
from bench.gate.worker import Blamed, Worker, synchronise
from vitlr.ops.backends import cuda, native

Answer = dict[str, Any]


def sweep(worker: Worker, task: Task) -> Answer:
    """Times of a CUDA kernel by forced plans, each checked first, beside the plan that the model picks."""
    call: Call = task.given["call"]
    bad = lines.excluded(lines.read(worker.book))
    if (task.op, task.candidate, task.dtype) in bad:
        return {"skipped": "it failed the gate"}
    sets = input_sets(call.make, worker.device)
    refusal = why_not(call, task.candidate, sets[0])
    if refusal is not None:
        return {"skipped": refusal}
    key = call.key(sets[0])
    plain, exact = references(call, sets[0], worker.device)
    device = native.device_index(worker.device)
    own = tuple(native.cuda().lowrank_sm90_plan(key.M, key.K, key.D, key.N, key.r1, key.r2, key.residual, device)[:5])
    runs = {}
    for plan in dict.fromkeys((own, *plans(key.M, max(key.r1, key.r2)))):
        label, who = f"{plan}{' (own)' if plan == own else ''}", f"{task.candidate} {plan} {call.label}"
        if (task.op, who, task.dtype) in bad:
            continue
        with Blamed(worker, "check", task.op, who, task.dtype) as held:
            function = functools.partial(cuda.run_mlp, plan=plan)
            judge(function, sets[0], plain, exact, worker.device)
            run = prepared(function, sets, worker.device)
        if held.ok:
            runs[label] = run
    worker.begin("turns")
    us = in_turns(runs, {name: len(sets) for name in runs}, worker.device, rounds=10)
    return {"value": {"call": call.label, "us": {name: round(time, 3) for name, time in us.items()}}}


TILES = ((64, 1), (128, 1), (192, 1), (64, 3), (128, 3), (192, 2), (256, 2))


def plans(M: int, r: int) -> list[tuple[int, int, int, int, int]]:
    """Plans of the MLP of the least rank that holds r: both heights of tiles, clusters of one to four CTAs."""
    least = min(R for R, _ in TILES if r <= R)
    found = []
    for R, warpgroups in TILES:
        for ranks in (1, 2, 4):
            room = (cuda.PROCESSORS if ranks < 4 else cuda.PROCESSORS * 9 // 10) // ranks
            if least == R:
                found.append((R, warpgroups, ranks, min(room, -(-M // (64 * warpgroups))), 1))
    return found


def autotune(worker: Worker, task: Task) -> Answer:
    """The fastest tiles of a Triton kernel on a call, as rows for triton_kernels/tuned."""
    call: Call = task.given["call"]
    if (task.op, task.candidate, task.dtype) in lines.excluded(lines.read(worker.book)):
        return {"skipped": "it failed the gate"}
    args = call.make(0)
    refusal = why_not(call, task.candidate, args)
    if refusal is not None:
        return {"skipped": refusal}
    from vitlr.triton_kernels import tables

    worker.begin("autotune", task.op, task.candidate, task.dtype)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {tables.VARIABLE: "1", "XDG_CACHE_HOME": folder}
        tables.measured.cache_clear()
        try:
            runner(call, task)(*args)
            synchronise(worker.device)
            rows = list(tables.measured(task.op)) if task.given["keep"] else []
            return {"value": {"call": call.label, "rows": rows}}
        finally:
            del os.environ[tables.VARIABLE], os.environ["XDG_CACHE_HOME"]
            tables.measured.cache_clear()
