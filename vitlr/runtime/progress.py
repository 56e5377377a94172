"""Progress on stderr: a bar for people at a terminal, one closing line for logs, nothing on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, "int | None"], None]


@contextmanager
def bar(label: str, total: int | None = None, unit: str = "images") -> Iterator[Progress]:
    """Yield a function (done, total) that draws how far `label` is, to be passed as any stage's `progress=`.

    At a terminal a bar with the rate and the time left; elsewhere only "label: 1000 images in 12.3 s" at the end. An
    exception ends it without that line, and what never began says nothing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Drawing

    console = Console(stderr=True)
    reached: int | None = None
    start = time.perf_counter()
    if not console.is_terminal or console.is_dumb_terminal:

        def count(done: int, total: int | None = None) -> None:
            nonlocal reached
            reached = done

        yield count
        if reached is not None:
            print(f"{label}: {reached} {unit} in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        return

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    drawing = Drawing(*columns, console=console)
    task = drawing.add_task(label, total=total, rate=unit)

    def draw(done: int, total: int | None = None) -> None:
        rate = done / max(time.perf_counter() - start, 1e-9)
        drawing.start()  # at the first call
        drawing.update(task, completed=done, rate=f"{rate:.1f} {unit}/s")
        if total is not None:
            drawing.update(task, total=total)

    try:
        yield draw
    finally:
        drawing.stop()
