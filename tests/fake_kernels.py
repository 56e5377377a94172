"""A kernel that is none: what dispatch, modules and compilers do with a candidate can be seen without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vitlr import ops
from vitlr.ops import candidates


@contextmanager
def fake_kernel(
    op: str,
    supports: Callable[[Any], str | None] = lambda key: None,
    name: str = "fake",
    ran_on: tuple[str, ...] = ("a test",),
    worth: Callable[[Any], str | None] = lambda key: None,
) -> Iterator[list[tuple]]:
    """Registers a candidate that runs the reference; yields the list of the argument tuples it was called with."""
    reference, calls = candidates(op)[0].run, []

    def run(*args: Any) -> Any:
        calls.append(args)
        return reference(*args)

    ops.register(op, ops.Candidate(name, supports, run, ran_on, worth))
    try:
        yield calls
    finally:
        ops.unregister(op, name)
