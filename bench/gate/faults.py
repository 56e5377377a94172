"""Candidates that go wrong on purpose, one a kind of fault: what the rehearsal has to name, exclude and survive.

They take every call of lowrank_linear, in their own processes: what else runs there has to come through.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gate import worker
from vitlr.ops.dispatch import registry
from vitlr.ops.layers import lowrank_linear

OP = lowrank_linear.OP
Run = Callable[..., Tensor]


def _hangs(*args: Any) -> Tensor:
    time.sleep(3600)
    raise AssertionError("nobody waits for that long")


def _aborts(*args: Any) -> Tensor:
    os.abort()


def _segfaults(*args: Any) -> Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    return _hangs()


def _nan(*args: Any) -> Tensor:
    y = lowrank_linear.reference(*args).clone()
    y[-1, -1] = float("nan")
    return y


def _wrong(*args: Any) -> Tensor:
    y = lowrank_linear.reference(*args).clone()
    y[0, 0] += 0.5
    return y


def _out_of_memory(*args: Any) -> Tensor:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")


def _sticky(*args: Any) -> Tensor:
    worker.sticky.append("CUDA error: an illegal memory access was encountered")
    raise RuntimeError(worker.sticky[0])


def _raises(*args: Any) -> Tensor:
    raise ValueError("this shape is not for me")


class _HangsLater:
    """Right when it is checked, and then never comes back: as a race that shows under load."""

    calls = 0

    def __call__(self, *args: Any) -> Tensor:
        type(self).calls += 1
        return _hangs() if self.calls > 1 else lowrank_linear.reference(*args)


FAULTS: dict[str, tuple[Run, str, str]] = {
    "fault.hangs": (_hangs, "hung", "no answer for"),
    "fault.aborts": (_aborts, "crashed", "SIGABRT"),
    "fault.segfaults": (_segfaults, "crashed", "SIGSEGV"),
    "fault.nan": (_nan, "nan", "NaN or Inf"),
    "fault.wrong": (_wrong, "wrong", "off by"),
    "fault.out_of_memory": (_out_of_memory, "memory", "out of memory"),
    "fault.sticky": (_sticky, "sticky", "illegal memory access"),
    "fault.raises": (_raises, "raised", "not for me"),
    "fault.hangs_later": (_HangsLater(), "hung", "no answer for"),
}
"""Name: what it does, the word that the gate has to find for it, what the detail has to contain."""


def register() -> None:
    """Make them candidates of lowrank_linear, in this process and those forked from it."""
    known = {candidate.name for candidate in registry.candidates(OP)}
    for name, (run, _, _) in FAULTS.items():
        if name not in known:
            registry.register(OP, registry.Candidate(name, lambda key: None, run))
