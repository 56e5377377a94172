"""The clock that all prices in milliseconds come from: modules take turns, and the least of several times counts."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from vitlr.data.batches import call
from vitlr.errors import InputError
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.machine import cores

_LEAST, _MOST = 7, 50  # rounds
_SECONDS = 8.0  # that a race should not go on for, once it has gone through its least rounds
_WARM = 2  # runs before those that count: the first one packs weights


def race(runs: Mapping[str, tuple[nn.Module, Any]], threads: int) -> dict[str, float]:
    """Milliseconds of every module on its inputs: the least of several rounds, in each of which all take their turn.

    A model counts block by block, each by its least: what disturbs a long run hits some of its blocks. Of a single
    thread only the time counts that it runs: others on the machine do not make a layer slower.
    """
    now = time.thread_time if threads == 1 else time.perf_counter
    collecting = gc.isenabled()
    with ExitStack() as stack:
        stack.enter_context(_on_threads(threads))
        stack.enter_context(torch.inference_mode())
        started: dict[str, list[float]] = {name: [] for name in runs}
        for name, (module, _) in runs.items():
            stack.enter_context(evaluation_mode(module))
            for block in _blocks(module):
                start = started[name].append
                stack.callback(block.register_forward_pre_hook(lambda *_, start=start: start(now())).remove)

        def run(name: str) -> np.ndarray:
            module, inputs = runs[name]
            marks = started[name]
            marks[:] = [now()]
            call(module, inputs)
            return np.diff([*marks, now()])

        for _ in range(_WARM):
            times = {name: run(name) for name in runs}
        rounds = int(_SECONDS / max(sum(found.sum() for found in times.values()), 1e-9))
        order = list(runs)
        stack.callback(gc.enable if collecting else gc.disable)
        gc.disable()
        for _ in range(min(max(rounds, _LEAST), _MOST)):
            for name in order:
                found = run(name)
                same = len(found) == len(times[name])  # a model that takes another way every time counts as a whole
                times[name] = np.minimum(times[name], found) if same else min(times[name], found, key=np.sum)
            order.append(order.pop(0))
    return {name: 1e3 * float(found.sum()) for name, found in times.items()}


def check_threads(threads: int | None) -> int:
    """The threads that a time counts for; `InputError` for more of them than there are cores."""
    if threads is not None and threads > cores():
        raise InputError(f"threads={threads}: this process may use {cores()} cores; times can be measured for no more")
    return torch.get_num_threads() if threads is None else threads


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model, outermost ones only; a layer within one is not listened to, which could slow it down."""
    held = list(model.children())
    container = isinstance(model, (nn.ModuleList, nn.Sequential)) and len(held) > 2
    if container and all(any(part.children()) for part in held):
        yield from held
        return
    for part in held:
        yield from _blocks(part)


@contextmanager
def _on_threads(threads: int) -> Iterator[None]:
    """Torch, and the kernels with it, on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
