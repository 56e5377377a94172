"""What workers do: one function a kind of task. It gets the worker and the task, and returns what goes into the result.

A job that compares candidates says by `begin` whose turn it is, so that a death is blamed on the right one, and goes on
without those that raise.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from bench.cases.calls import Call
from bench.cases.clock import in_turns, input_sets, microseconds, prepared
from bench.cases.correctness import Fault, judge, references
from bench.gate import choice as choices
from bench.gate import lines, models, parts, prepare, rivals
from bench.gate import solve as solvers
from bench.gate.tasks import Task
from bench.gate.worker import Worker, synchronise
from vitlr.ops import _cuda, _dispatch, _measured, _native

Answer = dict[str, Any]


def build(worker: Worker, task: Task) -> Answer:
    """Compile csrc/cuda for this card."""
    return {"value": prepare.build(task.given["debug"])}


def ceilings(worker: Worker, task: Task) -> Answer:
    """Bytes/s of a copy, read and written, and FLOP/s of a bf16 product, with what the figures depend on."""
    device, cuda = worker.device, worker.device.type == "cuda"
    n = 8192 if cuda else 256
    dtype = torch.bfloat16 if cuda else torch.float32
    source = torch.randn(2**30 if cuda else 2**16, device=device)  # 4 GiB: far beyond any cache
    target = torch.empty_like(source)
    A, B = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    us = microseconds(
        {"copy": lambda: target.copy_(source), "product": lambda: A @ B}, [()], device, rounds=10, graphs=False
    )
    moved = 2 * source.numel() * source.element_size()
    return {
        "value": {
            "bytes_per_s": moved / us["copy"] * 1e6,
            "flops_per_s": 2 * n**3 / us["product"] * 1e6,
            "machine": prepare.machine(device),
        }
    }


def check(worker: Worker, task: Task) -> Answer:
    """Is a candidate right on a call, by its own plan or by a forced one?"""
    call: Call = task.given["call"]
    args = call.make(0)
    worker.begin("reference")
    refusal = _refusal(call, task.candidate, args)
    if refusal is not None:
        return {"skipped": refusal}
    plain, exact = references(call, args, worker.device)
    worker.begin("check", task.op, task.candidate, task.dtype)
    judge(_runs(call, task), args, plain, exact, worker.device)
    return {"value": "right"}


def _refusal(call: Call, name: str, args: tuple) -> str | None:
    """Why a candidate does not take a call; None where it does."""
    found, name = {candidate.name: candidate for candidate in _dispatch.candidates(call.op)}, name.partition(" ")[0]
    return found[name].supports(call.key(args)) if name in found else f"{call.op} has no candidate {name}"


def _runs(call: Call, task: Task) -> Callable[..., Any]:
    name = task.candidate.partition(" ")[0]  # "cuda.sm90 debug" is cuda.sm90 as well
    run = {candidate.name: candidate.run for candidate in _dispatch.candidates(call.op)}[name]
    plan = task.given.get("plan")
    if plan is None:
        return run
    return functools.partial(_cuda.run_mlp if call.op == "lowrank_mlp" else _cuda.run_linear, plan=tuple(plan))


def debug(worker: Worker, task: Task) -> Answer:
    """The same in the debug build, whose waits give up and name their barrier."""
    module = worker.kept.setdefault("debug", None) or prepare.load_debug()
    worker.kept["debug"] = module
    try:
        return check(worker, task)
    except Exception as cause:
        where = module.hung()
        if where:
            raise Fault("hung", f"{where}; {cause}") from cause
        raise


def capture(worker: Worker, task: Task) -> Answer:
    """One launch, captured in a CUDA graph and replayed, against the same launch outside."""
    call: Call = task.given["call"]
    args = call.make(0)
    worker.begin("reference")
    refusal = _refusal(call, task.candidate, args)
    if refusal is not None:
        return {"skipped": refusal}
    plain, exact = references(call, args, worker.device)
    worker.begin("capture", task.op, task.candidate, task.dtype)
    run = _runs(call, task)
    run(*args)
    synchronise(worker.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*args)

    def replayed(*_: Any) -> torch.Tensor:
        out.fill_(float("nan"))
        graph.replay()
        return out

    judge(replayed, args, plain, exact, worker.device)
    return {"value": "right"}


def part(worker: Worker, task: Task) -> Answer:
    """One part of the batched solve on a GPU against torch."""
    worker.begin("check", task.op, task.candidate, task.dtype)
    refusal = parts.check(task.given["part"], task.given["n"], worker.device)
    return {"skipped": refusal} if refusal is not None else {"value": "right"}


def row(worker: Worker, task: Task) -> Answer:
    """Times of every candidate that is right at this very shape, and of its rivals, taking turns."""
    call: Call = task.given["call"]
    book = lines.read(worker.book)
    bad, right = lines.excluded(book), lines.right(book)
    worker.begin("inputs")
    sets = input_sets(call.make, worker.device)
    able = call.candidates(sets[0])
    functions: dict[str, Callable[..., Any]] = {"torch": able.pop("torch")}
    plain = exact = None
    for name, run in able.items():
        if (call.op, name, task.dtype) in bad:
            continue
        if (call.op, name, call.label) in right:
            functions[name] = run
            continue
        if plain is None:
            worker.begin("reference")
            plain, exact = references(call, sets[0], worker.device)
        with _Blamed(worker, "check", call.op, name, task.dtype) as held:
            judge(run, sets[0], plain, exact, worker.device)
        if held.ok:
            functions[name] = run
    del plain, exact
    candidates = list(functions)
    inputs = dict.fromkeys(functions, sets)
    if task.given["dense"]:
        dense = input_sets(rivals.inputs(task.given["dense"], sets[0], worker.device), worker.device)
        for name in task.given["rivals"]:
            if (call.op, name, task.dtype) not in bad:
                functions[name] = rivals.function(name, task.given["dense"], call.op, worker.device)
                inputs[name] = sets if name.startswith("torch") else dense
    runs = {}
    for name, function in functions.items():
        with _Blamed(worker, "first replay", call.op, name, task.dtype) as held:
            run = prepared(function, inputs[name], worker.device)
            run()
            synchronise(worker.device)
        if held.ok:
            runs[name] = run
    worker.begin("turns")
    us = in_turns(runs, {name: len(inputs[name]) for name in runs}, worker.device)
    if any(name in runs for name in ("dense compiled", "torch compiled")):
        torch.compiler.reset()
    value = {
        "op": call.op,
        "call": call.label,
        "key": _measured.describe(call.key(sets[0])),
        "us": {name: round(time, 3) for name, time in us.items()},
        "candidates": [name for name in candidates if name in us],
    }
    return {"value": value}


class _Blamed:
    """What a candidate raises inside is its fault, and the job goes on: unless the device no longer answers."""

    def __init__(self, worker: Worker, doing: str, op: str, candidate: str, dtype: str) -> None:
        self.worker, self.who, self.ok = worker, (op, candidate, dtype), False
        worker.begin(doing, *self.who)

    def __enter__(self) -> _Blamed:
        return self

    def __exit__(self, kind: Any, cause: BaseException | None, trace: Any) -> bool:
        self.ok = cause is None
        if cause is None or not isinstance(cause, Exception):
            return False
        self.worker.settle()
        self.worker.blame(*self.who, cause)
        return True


def compile(worker: Worker, task: Task) -> Answer:
    """What torch.compile makes of a rival, once, so that the row that times it finds the compiler's cache warm."""
    call: Call = task.given["call"]
    args = call.make(0)
    name = task.given["rival"]
    worker.begin("compile", task.op, name, task.dtype)
    function = rivals.function(name, "mlp", call.op, worker.device)
    function(*(args if name.startswith("torch") else rivals.inputs("mlp", args, worker.device)(0)))
    synchronise(worker.device)
    return {"value": "compiled"}


def sweep(worker: Worker, task: Task) -> Answer:
    """Times of a CUDA kernel by forced plans, each checked first, beside the plan that the model picks."""
    call: Call = task.given["call"]
    bad = lines.excluded(lines.read(worker.book))
    if (task.op, task.candidate, task.dtype) in bad:
        return {"skipped": "it failed the gate"}
    sets = input_sets(call.make, worker.device)
    refusal = _refusal(call, task.candidate, sets[0])
    if refusal is not None:
        return {"skipped": refusal}
    key = call.key(sets[0])
    plain, exact = references(call, sets[0], worker.device)
    device = _native.device_index(worker.device)
    own = tuple(_native.cuda().lowrank_sm90_plan(key.M, key.K, key.D, key.N, key.r1, key.r2, key.residual, device)[:5])
    runs = {}
    for plan in dict.fromkeys((own, *plans(key.M, max(key.r1, key.r2)))):
        label, who = f"{plan}{' (own)' if plan == own else ''}", f"{task.candidate} {plan} {call.label}"
        if (task.op, who, task.dtype) in bad:
            continue
        with _Blamed(worker, "check", task.op, who, task.dtype) as held:
            function = functools.partial(_cuda.run_mlp, plan=plan)
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
            room = (_cuda.PROCESSORS if ranks < 4 else _cuda.PROCESSORS * 9 // 10) // ranks
            if least == R:
                found.append((R, warpgroups, ranks, min(room, -(-M // (64 * warpgroups))), 1))
    return found


def autotune(worker: Worker, task: Task) -> Answer:
    """The fastest tiles of a Triton kernel on a call, as rows for triton_kernels/tuned."""
    call: Call = task.given["call"]
    if (task.op, task.candidate, task.dtype) in lines.excluded(lines.read(worker.book)):
        return {"skipped": "it failed the gate"}
    args = call.make(0)
    refusal = _refusal(call, task.candidate, args)
    if refusal is not None:
        return {"skipped": refusal}
    from vitlr.triton_kernels import tables

    worker.begin("autotune", task.op, task.candidate, task.dtype)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {tables.VARIABLE: "1", "XDG_CACHE_HOME": folder}
        tables.measured.cache_clear()
        try:
            _runs(call, task)(*args)
            synchronise(worker.device)
            rows = list(tables.measured(task.op)) if task.given["keep"] else []
            return {"value": {"call": call.label, "rows": rows}}
        finally:
            del os.environ[tables.VARIABLE], os.environ["XDG_CACHE_HOME"]
            tables.measured.cache_clear()


def model(worker: Worker, task: Task) -> Answer:
    """Images a second of a whole model: dense, compressed as plain products, and with kernels."""
    book = lines.read(worker.book)
    with choices.trusting(worker.device, lines.times(book), lines.excluded(book)):
        found = models.run(worker.kept, worker.device, worker.begin, **task.given)
    return {"value": found}


def solve(worker: Worker, task: Task) -> Answer:
    """Time and excess loss of one solver of a whole ViT-B."""
    if (task.op, task.candidate, task.dtype) in lines.excluded(lines.read(worker.book)):
        return {"skipped": "it failed the gate"}
    worker.begin("solve", task.op, task.candidate, task.dtype)
    found = solvers.run(worker.kept, worker.device, **task.given)
    return {"value": found} if found else {"skipped": "it cannot run here"}


def choice(worker: Worker, task: Task) -> Answer:
    """What dispatch takes with these times in its table, and how much slower that is than the best."""
    book = lines.read(worker.book)
    return {"value": choices.chosen(worker.device, lines.times(book), lines.excluded(book))}
