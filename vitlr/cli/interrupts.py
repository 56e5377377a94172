"""SIGINT and SIGTERM as an interrupt that arrives, also where code of others swallows the first one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vitlr.errors import Interrupted

AGAIN = 0.5  # seconds after which an interrupt that nothing unwinds from is raised once more
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_TIMED = hasattr(signal, "setitimer")
_came = False  # one of them, since `arm`


def arm() -> None:
    """Let both signals raise `KeyboardInterrupt`, and again until it unwinds: imports may catch whatever is raised.

    SIGINT stays ignored where it was, as shells have it for what runs in the background.
    """
    global _came
    _came = False
    own = os.getpid()

    def interrupted(number: int, frame: Any) -> None:
        global _came
        _came = True
        if _TIMED and os.getpid() == own:  # not in workers that were forked
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        raise KeyboardInterrupt

    def again(number: int, frame: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
        if not _unwinding():
            raise KeyboardInterrupt

    for number in _NUMBERS:
        if number != signal.SIGINT or signal.getsignal(number) is signal.default_int_handler:
            signal.signal(number, interrupted)
    if _TIMED:
        signal.signal(signal.SIGALRM, again)


def disarm() -> None:
    """Ignore both: all is written, and the interpreter would die of one that comes while it shuts down."""
    if _TIMED:
        signal.setitimer(signal.ITIMER_REAL, 0)
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    # One that interrupts exec() of a string leaves CPython a note to die of SIGINT at the end; this takes it back.
    exec("")


@contextmanager
def outlasting() -> Iterator[None]:
    """Let an error after an interrupt count as that: a swallowed one leaves half an import, which fails by itself."""
    try:
        yield
    except Exception as cause:
        if _came:
            raise Interrupted(f"it came to {type(cause).__name__}: {cause!s:.200}") from cause
        raise


def _unwinding() -> bool:
    """Whether an interrupt, or what came of one, is being handled: what cleans up is left to end."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            return True
        error = error.__context__
    return False
