"""A task's candidate: whether it takes a call, and what runs it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from bench.cases.calls import Call
from bench.gate.tasks import Task
from vitlr.ops.backends import cuda
from vitlr.ops.dispatch import registry


def why_not(call: Call, name: str, args: tuple) -> str | None:
    """Why a candidate does not take a call; None where it does."""
    found, name = {candidate.name: candidate for candidate in registry.candidates(call.op)}, name.partition(" ")[0]
    return found[name].supports(call.key(args)) if name in found else f"{call.op} has no candidate {name}"


def runner(call: Call, task: Task) -> Callable[..., Any]:
    """What runs a task's candidate, by the plan that the task forces."""
    name = task.candidate.partition(" ")[0]  # "cuda.sm90 debug" is cuda.sm90 as well
    run = {candidate.name: candidate.run for candidate in registry.candidates(call.op)}[name]
    plan = task.given.get("plan")
    if plan is None:
        return run
    return functools.partial(cuda.run_mlp if call.op == "lowrank_mlp" else cuda.run_linear, plan=tuple(plan))
