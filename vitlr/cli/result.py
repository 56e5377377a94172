"""What a command answers, and how it is told: the result on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from vitlr.cli import interrupts
from vitlr.cli.command import flags_of, in_flags
from vitlr.cli.early import check_places
from vitlr.errors import Interrupted, ProcessLost, VitlrError
from vitlr.runtime.launch import launched, launched_first

_NO_NAME = {errno.ENAMETOOLONG, errno.ELOOP}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Result:
    """The same answer twice: `values` for `--json`, `text` for people (empty where it has been printed already)."""

    values: dict[str, Any]
    text: str


@contextlib.contextmanager
def resumable(folder: Path | None) -> Iterator[None]:
    """Let an interrupt say how to go on: from the snapshots in `folder`, or with `--resume` where there is none."""
    try:
        yield
    except KeyboardInterrupt as cause:
        if folder is None:
            raise Interrupted("with --resume DIR the next run would go on near where this one stopped") from cause
        raise Interrupted(f"run the same command again to go on from the snapshots in {folder}") from cause


def guarded(command: Callable[..., Result], together: bool = False) -> Callable[..., None]:
    """Run a command, print its result, and turn what vitlr raises on purpose into one line and an exit status.

    Several processes of a launcher run it `together`, else the first one alone.
    """
    flags = flags_of(command)

    @functools.wraps(command)
    def run(**options: Any) -> None:
        as_json = bool(options.get("as_json"))
        if not (together or launched_first()):
            return
        aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
        try:
            check_places(options)
            joined = _joined(options) if together else contextlib.nullcontext()
            with interrupts.outlasting(), _warnings_on_stderr(), aside, joined:
                result = command(**options)
            if as_json or result.text:
                typer.echo(json.dumps(result.values, allow_nan=False) if as_json else result.text)
        except KeyboardInterrupt as cause:
            _fail(f"interrupted; {cause}" if str(cause) else "interrupted", 130, cause)
        except VitlrError as cause:
            _fail(in_flags(str(cause), flags), cause.exit_status, cause)
        except MemoryError as cause:
            _fail(f"out of memory {cause}".strip() + "; try a smaller --batch-size", 1, cause)
        except OSError as cause:
            if cause.errno in _NO_NAME:
                _fail(f"{cause.filename!s:.200}: {cause.strerror}; name another file", 2, cause)
            if cause.errno not in _DISK_FULL:
                raise
            _fail(f"{cause.filename or 'a file'}: {cause.strerror}; free some space and run again", 1, cause)
        except ValueError as cause:
            if not isinstance(cause, UnicodeEncodeError) and "null byte" not in str(cause):
                raise
            _fail(f"a name is none that a file can have ({cause!s:.200}); name another file", 2, cause)
        except RuntimeError as cause:
            reason = _resource(cause)
            if reason is None:
                raise
            _fail(reason, 1, cause)

    return run


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns of plain text, the first `left` ones and the last flush left, the others flush right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    last = len(header) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left or column == last else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def wrapped(text: str, indent: int = 2, columns: int = 80) -> str:
    """Every line in so many columns, what follows set in."""
    how: dict[str, Any] = {"subsequent_indent": " " * indent, "break_on_hyphens": False, "break_long_words": False}
    return "\n".join(
        line if len(line) <= columns else textwrap.fill(line, columns, drop_whitespace=True, **how)
        for line in text.splitlines()
    )


@contextlib.contextmanager
def _joined(options: dict[str, Any]) -> Iterator[None]:
    """With the other processes that a launcher started, if it did."""
    if not launched():
        yield
        return
    from vitlr.cli.models import parse_device
    from vitlr.runtime import processes

    with processes.joined(parse_device(options.get("device"))):
        yield


def _fail(message: str, status: int, cause: BaseException) -> None:
    if launched():
        from vitlr.runtime import processes

        interrupts.disarm()  # the launcher ends what is left, which is no interrupt to speak of
        interrupted = isinstance(cause, KeyboardInterrupt)
        if not (interrupted or isinstance(cause, ProcessLost)):
            processes.leave_words(message, status)
        elif interrupted and (said := processes.words()) is not None:  # that is why the launcher interrupts
            status, message = said
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(status) from cause


def _resource(cause: RuntimeError) -> str | None:
    """One line for what the machine, not the program, ran out of; None for anything else."""
    text = str(cause)
    if "out of memory" in text or "can't allocate memory" in text:
        return f"out of memory ({text.splitlines()[0]}); try a smaller --batch-size"
    if text.startswith("DataLoader worker"):
        return f"a process that decodes images died ({text.splitlines()[0]}); try --workers 0"
    return None


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


@contextlib.contextmanager
def _warnings_on_stderr() -> Any:
    logger, handler = logging.getLogger("vitlr"), _Stderr(logging.WARNING)
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
