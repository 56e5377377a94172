"""Progress on stderr: a bar for people at a terminal, one closing line for the shell's logs, nothing on stdout."""

from __future__ import annotations

import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

Progress = Callable[[int, "int | None"], None]
Watch = Callable[..., AbstractContextManager["Progress | None"]]
F = TypeVar("F", bound=Callable[..., Any])
_drawn = 0  # bars that are open: a terminal has room for one


def shows(label: str, unit: str = "images") -> Callable[[F], F]:
    """Decorator of a function with `progress=`: a function (done, total), None for a bar at a terminal, False for none.

    The function itself always gets one that can be called.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(*given: Any, progress: Progress | bool | None = None, **more: Any) -> Any:
            with shown(progress, label, unit=unit) as advance:
                return function(*given, progress=advance, **more)

        signature = inspect.signature(function)
        told = signature.parameters["progress"].replace(annotation="Progress | bool | None")
        parameters = {**signature.parameters, "progress": told}
        run.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
        return cast(F, run)

    return decorate


def alone(function: F) -> F:
    """Decorator of a function with stages and `progress=`: where that says something, no stage draws a bar unasked."""

    @functools.wraps(function)
    def run(*given: Any, progress: Progress | bool | None = None, **more: Any) -> Any:
        global _drawn
        taken = progress is not None
        _drawn += taken
        try:
            return function(*given, progress=progress, **more)
        finally:
            _drawn -= taken

    return cast(F, run)


@contextmanager
def shown(
    progress: Progress | bool | None, label: str, total: int | None = None, unit: str = "images"
) -> Iterator[Progress]:
    """`progress` where it is a function; where nothing is said a bar, if stderr is a terminal and no bar is there."""
    from vitlr.runtime import processes  # needs torch, which is there where stages run

    if callable(progress):
        yield progress
    elif progress is False or _drawn or not processes.first() or sys.stderr is None or not sys.stderr.isatty():
        yield _silent
    else:
        with bar(label, total, unit) as draw:
            yield draw


def _silent(done: int, total: int | None = None) -> None:
    """Nobody looks."""


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

    global _drawn
    _drawn += 1
    try:
        yield draw
    finally:
        _drawn -= 1
        drawing.stop()
