"""The clock that all prices in milliseconds come from: modules take turns, and the least of several times counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from vitlr.data.batches import call
from vitlr.errors import InputError
from vitlr.measuring.timing import compare
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.machine import cores

_LEAST, _MOST = 5, 40  # rounds
_FILLED = 0.001  # seconds of one measurement, at least: longer ones are interrupted
_SECONDS = 6.0  # that a race should not go on for, once it has gone through its least rounds


def race(runs: Mapping[str, tuple[nn.Module, Any]], threads: int) -> dict[str, float]:
    """Milliseconds of every module on its inputs: the least of several rounds, in each of which all take their turn.

    Of a single thread only the time counts that it runs: others on the machine do not make a layer slower.
    """
    now = time.thread_time if threads == 1 else time.perf_counter
    functions = {name: _forward(module, inputs) for name, (module, inputs) in runs.items()}
    with ExitStack() as stack:
        stack.enter_context(on_threads(threads))
        for module, _ in runs.values():
            stack.enter_context(evaluation_mode(module))
        once = sum(timing.min for timing in compare(functions, repeats=1, warmup=2, min_seconds=0, now=now).values())
        rounds = min(max(int(_SECONDS / max(once, 1e-9)), _LEAST), _MOST)
        found = compare(functions, repeats=rounds, warmup=1, min_seconds=_FILLED, now=now)
    return {name: 1e3 * timing.min for name, timing in found.items()}


def check_threads(threads: int | None) -> int:
    """The threads that a time counts for; `InputError` for more of them than there are cores."""
    if threads is not None and threads > cores():
        raise InputError(f"threads={threads}: this process may use {cores()} cores; times can be measured for no more")
    return torch.get_num_threads() if threads is None else threads


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """Torch, and the kernels with it, on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _forward(module: nn.Module, inputs: Any) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return call(module, inputs)

    return run
