"""One window from its beginning: the book, what an earlier run found, the supervisor."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from bench.gate import lines
from bench.gate.lines import Book
from bench.gate.supervisor import Supervisor
from bench.gate.tasks import Window


def file_of(out: Path, number: int) -> Path:
    """Where the lines of a window are."""
    return out / f"window{number}.jsonl"


def run(window: Window, number: int, out: Path, after: Path | None, device: torch.device, start: float) -> Path:
    """Run a window that began at `start`, after what `after` holds; the file of its lines, which holds both."""
    before = lines.read(after) if after is not None else []
    book = Book(file_of(out, number), before)
    book.write(
        "window", name=window.name, seconds=window.seconds, at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    )
    Supervisor(book, device, start).run(window)
    return book.path
