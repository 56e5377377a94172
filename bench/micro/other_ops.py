"""Gated MLPs, residual layers and `W C Wᵀ`, every candidate that runs here: `pytest bench/micro/other_ops.py [-k glu]`.

Shapes of real models, small on a CPU. All candidates of a call take turns in one process (`_clock.microseconds`: CUDA
graphs over rotated inputs on a GPU, plain calls on a CPU); pytest-benchmark's own table times each of them apart, and
its JSON (`--benchmark-json FILE`) holds floor and ratio to plain torch as `extra_info`. What is wrong is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from bench.cases import calls, correctness
from bench.cases.calls import Call
from bench.cases.clock import input_sets, microseconds
from vitlr.ops.dispatch import registry

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
M = 8 * 1370 if CUDA else 197


def every() -> Iterator[Call]:
    """What is timed."""
    for packed in (True, False):  # SwiGLU of DINOv2-g
        yield calls.glu(M, 1536, 4096, 1536, 128, 128, DTYPE, DEVICE, packed)
    for form, group in (("int8", 64), ("int4", 64), ("fp8", 64), ("blockdiag", 192)):  # fc1 of ViT-B
        yield calls.residual_linear(M, 768, 3072, 32, form, group, DTYPE, DEVICE)
    for dtype in (torch.float32, torch.float64):
        yield calls.chain(48 if CUDA else 4, 768 if CUDA else 192, 768 if CUDA else 192, dtype, DEVICE)


def pairs() -> Iterator[tuple[Call, str]]:
    """Each call with each candidate that can run it here."""
    for call in every():
        for name in call.candidates(call.make(0)):
            yield call, name


@pytest.mark.parametrize(("call", "name"), pairs(), ids=lambda value: value.label if isinstance(value, Call) else value)
def test_candidate(benchmark: Callable, capsys: pytest.CaptureFixture, call: Call, name: str) -> None:
    wrong = [row["problem"] for row in correctness.check_call(call, DEVICE) if row["candidate"] == name]
    assert wrong in ([], [None]), wrong
    sets = input_sets(call.make, DEVICE)
    run = call.candidates(sets[0])
    us = microseconds({key: run[key] for key in ("torch", name)}, sets, DEVICE)
    limits = registry.ceilings_of(DEVICE)
    floor = registry._ops[call.op].roofline(call.key(sets[0]), limits).floor_us
    benchmark.group = f"{call.op} {call.label}"
    benchmark.extra_info.update(us=us[name], floor_us=floor, ratio_to_torch=us["torch"] / us[name])
    with capsys.disabled():
        told = "unknown" if floor is None else f"{floor:.1f} µs"
        print(f"\n{call.op} {call.label} {name}: {us[name]:.1f} µs, floor {told}, {us['torch'] / us[name]:.2f}x torch")
    benchmark.pedantic(run[name], args=sets[0], rounds=5, warmup_rounds=1)
