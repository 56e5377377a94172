"""Several processes of one run for tests: forked from a server that has torch already, so that each costs no import."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "timm", "vitlr.compression", "vitlr.training", "vitlr.cli.app"])


def launch(function: Callable[..., Any], count: int, *given: Any) -> tuple[list[Any], Any]:
    """Start `function(*given)` in so many processes, as a launcher does; the processes, and a queue of answers."""
    answers, told = _CONTEXT.Queue(), _told(count)
    children = [
        _CONTEXT.Process(target=_run, args=(answers, {**told, **_own(i)}, function, given)) for i in range(count)
    ]
    for child in children:
        child.start()
    return children, answers


def run(function: Callable[..., Any], count: int, *given: Any, within: float = 120.0) -> list[Any]:
    """What `function(*given)` answers in every process, in order of rank; the exception where it raised one."""
    children, answers = launch(function, count, *given)
    found: dict[int, Any] = {}
    end = time.monotonic() + within
    while len(found) < count:
        try:
            number, answer = answers.get(timeout=max(end - time.monotonic(), 0.1))
        except queue.Empty:
            for child in children:
                child.kill()
            raise AssertionError(f"only {sorted(found)} of {count} processes answered in {within:.0f} s") from None
        found[number] = answer
    for child in children:
        child.join(10)
        child.kill()
    return [found[number] for number in range(count)]


def _told(count: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


def _own(number: int) -> dict[str, str]:
    return {"RANK": str(number), "LOCAL_RANK": str(number)}


def _run(answers: Any, told: dict[str, str], function: Callable[..., Any], given: tuple[Any, ...]) -> None:
    os.environ.update(told)
    import torch

    from vitlr.runtime import processes

    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        with processes.joined(torch.device("cpu")):
            answer = function(*given)
    except BaseException as cause:
        traceback.print_exc()
        answer = cause
    answers.put((int(told["RANK"]), answer))
    answers.close()
    answers.join_thread()
    if isinstance(answer, BaseException):
        os._exit(1)  # as a process that fails does: no one waits for it


def shell(arguments: list[Any], count: int, folder: Any, before: Callable[[], None] | None = None) -> list[Any]:
    """Start `vitlr` with these arguments in so many processes, after `before()`; what each says goes to a file."""
    told = _told(count)
    children = [
        _CONTEXT.Process(
            target=_shell, args=({**told, **_own(i)}, [*map(str, arguments)], str(folder / f"{i}"), before)
        )
        for i in range(count)
    ]
    for child in children:
        child.start()
    return children


def _shell(told: dict[str, str], arguments: list[str], said: str, before: Callable[[], None] | None) -> None:
    os.environ.update(told)
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", 1) for number in (1, 2))
    sys.__stderr__ = sys.stderr
    from vitlr.cli import app

    if before is not None:
        before()
    sys.argv = ["vitlr", *arguments]
    app.main()
