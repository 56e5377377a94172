"""A process that does the tasks of one group, one at a time, and says what comes of each.

It is forked by the supervisor with everything imported and CUDA not yet touched, and dies with it. What a task prints,
and what the CUDA driver prints when it dies, is the worker's output, of which the supervisor keeps the end.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.cases.correctness import Fault
from bench.gate.tasks import Group, Task

PR_SET_PDEATHSIG = 1


def kind_of(cause: BaseException) -> str:
    """One word for an exception."""
    if isinstance(cause, Fault):
        return cause.kind
    if isinstance(cause, (torch.cuda.OutOfMemoryError, MemoryError)) or "out of memory" in str(cause):
        return "memory"
    return "raised"


def told(cause: BaseException) -> str:
    """An exception in one line."""
    first = str(cause).splitlines()[0] if str(cause) else ""
    return f"{type(cause).__name__}: {first}"[:300]


class Worker:
    """What a job gets: the device, the book so far, and a way to say what begins and who did wrong."""

    def __init__(self, device: torch.device, book: Path, say: Callable[[dict[str, Any]], None]) -> None:
        self.device, self.book, self._say = device, book, say
        self.kept: dict[str, Any] = {}  # what tasks of one group share

    def begin(self, doing: str, op: str = "", candidate: str = "", dtype: str = "") -> None:
        """From here on a crash or a hang is this candidate's."""
        self._say({"stage": {"doing": doing, "op": op, "candidate": candidate, "dtype": dtype}})

    def blame(self, op: str, candidate: str, dtype: str, cause: BaseException) -> None:
        """A candidate did wrong, and the task goes on without it."""
        self._say({"fault": {"op": op, "candidate": candidate, "dtype": dtype, **described(cause)}})

    def settle(self) -> None:
        """After an exception: raises if the device no longer answers, and then this process is of no more use."""
        try:
            synchronise(self.device)
        except Exception as cause:
            raise Fault("sticky", f"the process is lost: {told(cause)}") from cause


class Blamed:
    """What a candidate raises inside is its fault, and the job goes on: unless the device no longer answers."""

    def __init__(self, worker: Worker, doing: str, op: str, candidate: str, dtype: str) -> None:
        self.worker, self.who, self.ok = worker, (op, candidate, dtype), False
        worker.begin(doing, *self.who)

    def __enter__(self) -> Blamed:
        return self

    def __exit__(self, kind: Any, cause: BaseException | None, trace: Any) -> bool:
        self.ok = cause is None
        if cause is None or not isinstance(cause, Exception):
            return False
        self.worker.settle()
        self.worker.blame(*self.who, cause)
        return True


def described(cause: BaseException) -> dict[str, str]:
    return {"fault": kind_of(cause), "detail": told(cause)}


sticky: list[str] = []
"""Stands in for CUDA's sticky error where the gate is rehearsed: once something is in it, every call raises."""


def synchronise(device: torch.device) -> None:
    """Wait for the device; raises what it has to say of everything so far."""
    if sticky:
        raise RuntimeError(sticky[0])
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def serve(group: Group, device: torch.device, book: Path, read: int, write: int, parent: int) -> None:
    """Do the tasks whose numbers come in, until no more come."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be told
        return
    if torch.cuda._is_in_bad_fork():
        raise RuntimeError("CUDA was touched before the worker was forked")
    faulthandler.enable(all_threads=False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # what a crash leaves is its line
    from bench.gate import jobs

    def say(message: dict[str, Any]) -> None:
        sys.stdout.flush()
        os.write(write, (json.dumps(message) + "\n").encode())

    worker = Worker(device, book, say)
    with os.fdopen(read) as numbers:
        for number in numbers:
            task = group.tasks[int(number)]
            answer = _done(worker, task, getattr(jobs, task.kind))
            if device.type == "cuda" and answer.get("fault") != "sticky":
                torch.cuda.empty_cache()  # others share the card
            say({"result": answer})
            if answer.get("fault") == "sticky":
                return


def _done(worker: Worker, task: Task, job: Callable[[Worker, Task], Any]) -> dict[str, Any]:
    """What came of a task: value or skipped, or fault and detail; and its seconds."""
    start = time.monotonic()
    answer: dict[str, Any] = {}
    try:
        if sticky:
            raise Fault("sticky", sticky[0])
        answer = job(worker, task)
    except Exception as cause:  # whatever it is, it is this task's, and the next one may do better
        answer = described(cause)
        try:
            worker.settle()
        except Fault as lost:
            answer = {"fault": "sticky", "detail": f"{told(cause)}; {lost}"[:500]}
    return {**answer, "seconds": round(time.monotonic() - start, 3)}
