"""What workers do: one function a kind of task. It gets the worker and the task, and returns what goes into the result.

A job that compares candidates says by `begin` whose turn it is, so that a death is blamed on the right one, and goes on
without those that raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.cases.calls import Call
from bench.cases.clock import in_turns, input_sets, microseconds, prepared
from bench.cases.correctness import Fault, judge, references
from bench.gate import choice as choices
from bench.gate import lines, models, parts, pipeline, prepare, rivals
from bench.gate import solve as solvers
from bench.gate.candidates import runner, why_not
from bench.gate.tasks import Task
from bench.gate.tuning import autotune, sweep
from bench.gate.worker import Blamed, Worker, synchronise
from vitlr.ops.dispatch import measured

Answer = dict[str, Any]
__all__ = [
    "autotune",
    "build",
    "capture",
    "ceilings",
    "check",
    "choice",
    "compile",
    "debug",
    "model",
    "part",
    "row",
    "solve",
    "sweep",
    "whole",
]  # the kinds of tasks


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
    refusal = why_not(call, task.candidate, args)
    if refusal is not None:
        return {"skipped": refusal}
    plain, exact = references(call, args, worker.device)
    worker.begin("check", task.op, task.candidate, task.dtype)
    judge(runner(call, task), args, plain, exact, worker.device)
    return {"value": "right"}


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
    refusal = why_not(call, task.candidate, args)
    if refusal is not None:
        return {"skipped": refusal}
    plain, exact = references(call, args, worker.device)
    worker.begin("capture", task.op, task.candidate, task.dtype)
    run = runner(call, task)
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
        with Blamed(worker, "check", call.op, name, task.dtype) as held:
            judge(run, sets[0], plain, exact, worker.device)
        if held.ok:
            functions[name] = run
    del plain, exact
    candidates = list(functions)
    inputs = dict.fromkeys(functions, sets)
    form, of_kind = task.given["dense"], {"own": sets}
    for name in task.given["rivals"]:
        if (call.op, name, task.dtype) not in bad:
            functions[name], kind = rivals.function(name, form, call.op, worker.device), rivals.takes(name, form)
            if kind not in of_kind:
                of_kind[kind] = input_sets(rivals.inputs(kind, call.op, sets[0], worker.device), worker.device)
            inputs[name] = of_kind[kind]
    runs = {}
    for name, function in functions.items():
        with Blamed(worker, "first replay", call.op, name, task.dtype) as held:
            run = prepared(function, inputs[name], worker.device)
            run()
            synchronise(worker.device)
        if held.ok:
            runs[name] = run
    worker.begin("turns")
    us = in_turns(runs, {name: len(inputs[name]) for name in runs}, worker.device)
    if any(name.endswith(" compiled") for name in runs):
        torch.compiler.reset()
    value = {
        "op": call.op,
        "call": call.label,
        "key": measured.describe(call.key(sets[0])),
        "us": {name: round(time, 3) for name, time in us.items()},
        "candidates": [name for name in candidates if name in us],
    }
    return {"value": value}


def compile(worker: Worker, task: Task) -> Answer:
    """What torch.compile makes of a rival, once, so that the row that times it finds the compiler's cache warm."""
    call: Call = task.given["call"]
    args = call.make(0)
    name = task.given["rival"]
    worker.begin("compile", task.op, name, task.dtype)
    kind = rivals.takes(name, "mlp")
    function = rivals.function(name, "mlp", call.op, worker.device)
    function(*(args if kind == "own" else rivals.inputs(kind, call.op, args, worker.device)(0)))
    synchronise(worker.device)
    return {"value": "compiled"}


def model(worker: Worker, task: Task) -> Answer:
    """Images a second of a whole model: dense, compressed as plain products, and with kernels."""
    book = lines.read(worker.book)
    with choices.trusting(worker.device, lines.times(book), lines.excluded(book)):
        found = models.run(worker.kept, worker.device, worker.begin, **task.given)
    return {"value": found}


def whole(worker: Worker, task: Task) -> Answer:
    """Calibration and plan of a whole model, on the card and on the CPU."""
    return {"value": pipeline.run(worker.device, worker.begin, **task.given)}


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
