"""What a window consists of: phases of groups of tasks, with the seconds that are planned for them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.gate.lines import Line


@dataclass(frozen=True)
class Task:
    """One thing to do in a worker: `kind` is a function of jobs.py, `given` its arguments.

    `deadline`: seconds until it is killed; `seconds`: what is planned for it. A task is done once: `id` says which.
    `anew`: again on every machine, whatever an earlier run did.
    """

    kind: str
    call: str
    op: str = ""
    candidate: str = ""
    dtype: str = ""
    given: dict[str, Any] = field(default_factory=dict)
    deadline: float = 20.0
    seconds: float = 1.0
    anew: bool = False

    @property
    def id(self) -> str:
        return " ".join(filter(None, (self.kind, self.op, self.candidate, self.call)))


@dataclass(frozen=True)
class Group:
    """Tasks that share a worker, one after the other. `after`: the id of a task that has to be over before.

    `background`: it goes on beside the phases that follow.
    """

    name: str
    tasks: Sequence[Task]
    after: str = ""
    background: bool = False

    @property
    def seconds(self) -> float:
        """What is planned for all of them, with the worker's start."""
        return START + sum(task.seconds for task in self.tasks)


START = 1.0  # seconds: a worker is forked with everything imported, CUDA's context is its own


@dataclass(frozen=True)
class Phase:
    """Groups in as many lanes as run side by side. `seconds`: how long it may take before it is cut off.

    `groups` may depend on what was found so far.
    """

    name: str
    seconds: float
    groups: Callable[[Sequence[Line]], Sequence[Group]]
    lanes: int = 1

    def planned(self) -> float:
        """Seconds of the groups, each in the lane that is free first, if nothing goes wrong."""
        return makespan([group.seconds for group in self.groups(()) if not group.background], self.lanes)


@dataclass(frozen=True)
class Window:
    """Everything of one run. `start`: seconds until the first worker can be forked; `end`: what is kept in hand."""

    name: str
    phases: Sequence[Phase]
    start: float = 10.0
    end: float = 5.0

    @property
    def seconds(self) -> float:
        return self.start + sum(phase.seconds for phase in self.phases) + self.end


def makespan(lengths: Iterable[float], lanes: int) -> float:
    """When the last of these is over, begun in order, each where there is room first."""
    free = [0.0] * lanes
    for length in lengths:
        heapq.heappush(free, heapq.heappop(free) + length)
    return max(free)


def table(window: Window) -> str:
    """The plan as a Markdown table."""
    rows = [f"| {window.name} | tasks | planned s | limit s |", "|---|---|---|---|"]
    rows.append(f"| start | | {window.start:.0f} | {window.start:.0f} |")
    total = window.start + window.end
    for phase in window.phases:
        count = sum(len(group.tasks) for group in phase.groups(()))
        total += phase.planned()
        rows.append(f"| {phase.name} | {count} | {phase.planned():.0f} | {phase.seconds:.0f} |")
    rows.append(f"| in hand | | {window.end:.0f} | {window.end:.0f} |")
    rows.append(f"| together | | {total:.0f} | {window.seconds:.0f} |")
    return "\n".join(rows)
