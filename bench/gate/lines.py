"""What the gate finds, a line of JSON at a time, on disk as soon as it is known: complete whenever the gate is killed.

Every line has `what`: `window` (which began, on which machine), `start` (a task was handed to a worker), `stage` (what
of it begins), `fault` (what an op's candidate did in a dtype), `result` (a task is over), `left` (it was not run, and
why).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Who = tuple[str, str, str]
"""Op, candidate, dtype: what is excluded together."""
DEADLY = ("hung", "crashed", "sticky")
"""Faults that end the process in which they happen."""


def read(path: Path) -> list[Line]:
    """The lines of a file that are whole; a kill can cut off the last one."""
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "what" in line:
            found.append(line)
    return found


class Book:
    """The lines of one run, kept in memory and written as they come."""

    def __init__(self, path: Path, before: Iterable[Line] = ()) -> None:
        """Goes on where the file stops; `before`, of an earlier run, is copied into a file that is new."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.lines = path, read(path)
        cut = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if cut:
            os.write(self._file, b"\n")
        if not self.lines:
            for line in before:
                self._write(line)

    def write(self, what: str, **fields: Any) -> Line:
        """One line more, handed to the system before this returns: no kill of ours can take it back."""
        return self._write({"what": what, **fields})

    def _write(self, line: Line) -> Line:
        os.write(self._file, (json.dumps(line) + "\n").encode())
        self.lines.append(line)
        return line


def results(lines: Iterable[Line]) -> dict[str, Line]:
    """The results by the task's id, the last one where there are several."""
    return {line["id"]: line for line in lines if line["what"] == "result"}


def faults(lines: Iterable[Line]) -> list[Line]:
    """What candidates did wrong, in order."""
    return [line for line in lines if line["what"] == "fault"]


def excluded(lines: Iterable[Line]) -> set[Who]:
    """(op, candidate, dtype) that are neither timed nor chosen: any fault is enough."""
    return {(line["op"], line["candidate"], line["dtype"]) for line in faults(lines)}


def stopped(lines: Iterable[Line]) -> set[tuple[str, str]]:
    """(op, candidate) that ended two processes: nothing more of them is tried."""
    ends = Counter((line["op"], line["candidate"]) for line in faults(lines) if line["fault"] in DEADLY)
    return {who for who, count in ends.items() if count >= 2}


def right(lines: Iterable[Line]) -> set[tuple[str, str, str]]:
    """(op, candidate, call) that were checked and found right."""
    return {
        (line["op"], line["candidate"], line["call"])
        for line in results(lines).values()
        if line["kind"] == "check" and line.get("fault") is None and not line.get("skipped")
    }


def value(lines: Iterable[Line], kind: str) -> Any:
    """What the last task of a kind that succeeded has found; None where none did."""
    found = [line["value"] for line in lines if line["what"] == "result" and line["kind"] == kind and line.get("value")]
    return found[-1] if found else None


def times(lines: Iterable[Line]) -> list[Line]:
    """Rows {op, call, key, us} of candidates alone, as dispatch's table holds them; the last of each key."""
    lines = list(lines)
    bad, rows = excluded(lines), {}
    for line in results(lines).values():
        if line["kind"] == "row" and line.get("value"):
            found = line["value"]
            able = [name for name in found["candidates"] if (found["op"], name, line["dtype"]) not in bad]
            us = {name: found["us"][name] for name in able}
            rows[found["op"], str(found["key"])] = {**{n: found[n] for n in ("op", "call", "key")}, "us": us}
    return list(rows.values())
