"""Hands the tasks of a window to workers, watches the clock, and writes down everything that happens.

It never touches CUDA: whatever hangs, crashes or poisons its process is a worker's, and the next one begins behind it.
Two deaths stop a candidate, but never its siblings. A task that dies on a candidate it was only comparing is done again
without that candidate.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from bench.gate import lines
from bench.gate.lines import Book
from bench.gate.tasks import Group, Phase, Task, Window
from bench.gate.worker import serve

READY = 30.0  # seconds that a first task may take longer than others: CUDA's context is made, modules are loaded
AGAIN = 4  # times that a row is begun anew without the candidate that killed it


class _Lane:
    """A group under way: its tasks still to do and, most of the time, the worker that does them."""

    def __init__(self, group: Group) -> None:
        self.group, self.todo = group, list(range(len(group.tasks)))
        self.pid = self.to = self.back = 0
        self.task: Task | None = None
        self.stage: dict[str, str] = {}
        self.begun = self.deadline = 0.0
        self.tries = 0
        self.buffer = b""
        self.output: Any = None


class Supervisor:
    """One window on one device, its lines going into a book."""

    def __init__(self, book: Book, device: torch.device, start: float) -> None:
        self.book, self.device = book, device
        self.lanes: list[_Lane] = []
        self.first = len(book.lines)  # what an earlier run found lies before
        self.start = start

    def run(self, window: Window) -> None:
        """All phases; each ends on time, and so does the window."""
        ends = window.start
        try:
            for phase in window.phases:
                ends += phase.seconds
                self._run(phase, self.start + ends)
        finally:
            for lane in self.lanes:
                self._leave(lane, "the window was over")
                self._kill(lane)
            self.lanes.clear()
        self.book.write("over", window=window.name, seconds=round(time.monotonic() - self.start, 1))

    def _run(self, phase: Phase, until: float) -> None:
        began = time.monotonic()
        waiting = list(phase.groups(self.book.lines))
        while True:
            running = [lane for lane in self.lanes if not lane.group.background]
            if time.monotonic() >= until:
                for lane in running:
                    self._cut(lane)
                for group in waiting:
                    self._leave(_Lane(group), f"no time was left for {phase.name}")
                break
            for group in list(waiting):
                if (group.background or len(running) < phase.lanes) and self._may(group, waiting):
                    waiting.remove(group)
                    lane = _Lane(group)
                    self._next(lane)
                    if lane.task is not None:
                        self.lanes.append(lane)
                        running += [] if group.background else [lane]
            if not running and not waiting:
                break
            self._watch(until)
            self.lanes = [lane for lane in self.lanes if lane.task is not None]
        self.book.write("phase", name=phase.name, seconds=round(time.monotonic() - began, 1))

    def _may(self, group: Group, waiting: Sequence[Group]) -> bool:
        """Whether a group's turn has come: what it waits for is over, or nobody does it any more."""
        busy = {task.id for other in (*waiting, *(lane.group for lane in self.lanes)) for task in other.tasks}
        return not group.after or group.after not in busy or group.after in lines.results(self.book.lines[self.first :])

    def _done(self, task: Task) -> bool:
        """Whether a task has its result; what a fresh machine lacks counts only if this run did it."""
        return task.id in lines.results(self.book.lines[self.first if task.anew else 0 :])

    def _next(self, lane: _Lane) -> None:
        """Hand the next task to the lane's worker; without one, the lane is done."""
        lane.task = None
        stopped = lines.stopped(self.book.lines)
        while lane.todo:
            number = lane.todo.pop(0)
            task = lane.group.tasks[number]
            if self._done(task):
                continue
            if (task.op, task.candidate) in stopped:
                self.book.write("left", id=task.id, why="two deaths stopped this candidate")
                continue
            self._hand(lane, number, task)
            return
        self._kill(lane)  # and with it whatever it has started

    def _hand(self, lane: _Lane, number: int, task: Task) -> None:
        fresh = not lane.pid
        if fresh:
            self._fork(lane)
        lane.task, lane.stage = task, {}  # until the job says whose turn it is, nobody is to blame
        lane.begun = time.monotonic()
        lane.deadline = lane.begun + task.deadline + (READY if fresh and self.device.type == "cuda" else 0)
        self.book.write("start", id=task.id, kind=task.kind, group=lane.group.name, pid=lane.pid)
        with contextlib.suppress(BrokenPipeError):  # then it is found dead
            os.write(lane.to, f"{number}\n".encode())

    def _fork(self, lane: _Lane) -> None:
        read, lane.to = os.pipe()
        lane.back, write = os.pipe()
        lane.output, lane.buffer = tempfile.TemporaryFile(), b""  # noqa: SIM115, it outlives the worker
        parent = os.getpid()
        others = [end for other in self.lanes if other.pid for end in (other.to, other.back)]
        sys.stdout.flush()
        lane.pid = os.fork()
        if lane.pid:
            os.close(read)
            os.close(write)
            return
        status = 1
        try:  # the worker, which never returns from here
            os.setpgid(0, 0)
            for end in (*others, lane.to, lane.back):
                os.close(end)
            for stream in (1, 2):
                os.dup2(lane.output.fileno(), stream)
            serve(lane.group, self.device, self.book.path, read, write, parent)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def _watch(self, until: float) -> None:
        """Wait for the next word, death or deadline."""
        soonest = min([until, *(lane.deadline for lane in self.lanes)])
        wait = min(max(0.0, soonest - time.monotonic()), 1.0)
        ready, _, _ = select.select([lane.back for lane in self.lanes], [], [], wait)
        for lane in list(self.lanes):
            if lane.back in ready:
                self._hear(lane)
            elif time.monotonic() > lane.deadline:
                assert lane.task is not None
                self._died(lane, "hung", f"no answer for {time.monotonic() - lane.begun:.0f} s")

    def _hear(self, lane: _Lane) -> None:
        said = os.read(lane.back, 1 << 16)
        if not said:
            self._died(lane, "crashed", "")
            return
        *whole, lane.buffer = (lane.buffer + said).split(b"\n")
        for text in whole:
            self._note(lane, json.loads(text))

    def _note(self, lane: _Lane, message: dict[str, Any]) -> None:
        task = lane.task
        assert task is not None
        if "stage" in message:
            lane.stage = message["stage"]
            self.book.write("stage", id=task.id, **lane.stage)
        elif "fault" in message:
            self.book.write("fault", id=task.id, **message["fault"])
        else:
            self._over(lane, message["result"])

    def _over(self, lane: _Lane, answer: dict[str, Any]) -> None:
        task = lane.task
        assert task is not None
        if answer.get("fault") == "sticky":  # the worker ends by itself
            self._kill(lane)
            self._lost(lane, answer["fault"], answer["detail"])
            return
        if answer.get("fault") and lane.stage.get("candidate"):
            self._fault(task.id, lane.stage, answer["fault"], answer["detail"])
        self._result(task, answer)
        lane.tries = 0
        self._next(lane)

    def _died(self, lane: _Lane, fault: str, detail: str) -> None:
        status = self._kill(lane)
        if fault == "crashed":
            detail = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        self._lost(lane, fault, f"{detail}{_said(lane.output)}")

    def _lost(self, lane: _Lane, fault: str, detail: str) -> None:
        """A process is lost to a task: say who did it, and go on behind it, or without it."""
        task = lane.task
        assert task is not None
        known = bool(lane.stage.get("candidate"))
        if known:
            self._fault(task.id, lane.stage, fault, detail)
        lane.tries += 1
        if known and lane.stage["candidate"] != task.candidate and lane.tries < AGAIN:
            lane.todo.insert(0, lane.group.tasks.index(task))
        else:
            self._result(task, {"fault": fault, "detail": detail, "seconds": time.monotonic() - lane.begun})
            lane.tries = 0
        self._next(lane)

    def _fault(self, task: str, who: dict[str, str], fault: str, detail: str) -> None:
        names = {name: who[name] for name in ("op", "candidate", "dtype")}
        self.book.write("fault", id=task, **names, fault=fault, detail=detail)

    def _result(self, task: Task, answer: dict[str, Any]) -> None:
        facts = {"kind": task.kind, "op": task.op, "candidate": task.candidate, "dtype": task.dtype, "call": task.call}
        self.book.write("result", id=task.id, **facts, **{**answer, "seconds": round(answer["seconds"], 3)})

    def _cut(self, lane: _Lane) -> None:
        """The phase is over: what runs is nobody's fault."""
        self._kill(lane)
        if lane.task is not None:
            self.book.write("left", id=lane.task.id, why="cut off: the phase was over")
        self._leave(lane, "the phase was over")
        self.lanes.remove(lane)

    def _leave(self, lane: _Lane, why: str) -> None:
        for task in (lane.group.tasks[number] for number in lane.todo):
            if not self._done(task):
                self.book.write("left", id=task.id, why=why)

    def _kill(self, lane: _Lane) -> int:
        """End a worker and its children at once; its exit status, negative for a signal. 0 where there is none."""
        if not lane.pid:
            return 0
        status = _reaped(lane.pid, 0.05)  # an end of file can come a moment before the exit
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(lane.pid, signal.SIGKILL)
        if status is None:
            status = _reaped(lane.pid, 1.0)  # a kernel that spins for ever can hold it longer: nobody waits for that
        os.close(lane.to)
        os.close(lane.back)
        lane.pid = lane.to = lane.back = 0
        return -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)


def _reaped(pid: int, seconds: float) -> int | None:
    """The status of a process that ends within some seconds."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > end:
            return None
        time.sleep(0.005)


def _said(output: Any, most: int = 600) -> str:
    """The end of what a worker printed."""
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - 4000))
    said = [
        line for line in output.read().decode(errors="replace").splitlines() if not line.startswith("Extension mod")
    ]
    text = " ".join(" ".join(said).split())
    if len(text) > most:  # a stack begins with what happened where, other things end with it
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return f"; it said: {text}" if text else ""
