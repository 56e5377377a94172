"""Times that can be compared: candidates take turns in one process, so that drift of the machine hits all of them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.modules import like

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over `repeats` measurements of `calls` calls each."""

    min: float
    median: float
    repeats: int
    calls: int


def compare(
    functions: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 10,
    warmup: int = 2,
    min_seconds: float = 0.002,
    device: torch.device | str = "cpu",
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions without arguments against each other, in turns: round 1 of all, round 2 of all, ...

    Each is called `warmup` times first; then one measurement is as many calls as fill `min_seconds` (so that the
    clock's resolution does not count). Every round starts with another function, so that none always follows the
    same one. On a CUDA `device` the clock is read after `torch.cuda.synchronize`. Report ratios of `min`. Where others
    use the machine, `clock=time.process_time` tells what one thread takes of a processor, not how long it waits for it.
    Raises `InputError` where there is nothing to time.
    """
    if not functions or repeats < 1 or warmup < 1:
        raise InputError(f"{len(functions)} functions, repeats={repeats}, warmup={warmup}: expected at least 1 of each")
    wait = _synchronizer(torch.device(device))
    calls = {}
    for name, function in functions.items():
        seconds = min(_measure(function, 1, wait, clock) for _ in range(warmup))
        calls[name] = max(1, math.ceil(min_seconds / max(seconds, 1e-9)))
    seconds_of: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for name in order:
                seconds_of[name].append(_measure(functions[name], calls[name], wait, clock) / calls[name])
            order.append(order.pop(0))
    finally:
        if collecting:
            gc.enable()
    return {n: Timing(min(s), float(np.median(s)), repeats, calls[n]) for n, s in seconds_of.items()}


def forward(
    model: nn.Module, batch_size: int, *, input_size: Sequence[int] | None = None, seed: int = 0
) -> Callable[[], Tensor]:
    """A function that runs `model`, as it is, on one fixed random batch [batch_size, *input_size], without autograd.

    The batch has the model's device and dtype; `input_size` (C, H, W) defaults to what the model was made for. The
    numbers are random because zeros run faster on real hardware.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}, expected at least 1")
    if input_size is None:
        from vitlr.data import preprocessing

        input_size = preprocessing.input_size(model)
    weight = like(model)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, *input_size, generator=generator).to(weight.device, weight.dtype)

    def run() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def throughput(
    models: nn.Module | Mapping[str, nn.Module],
    batch_size: int,
    *,
    input_size: Sequence[int] | None = None,
    repeats: int = 10,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Images a second and milliseconds a batch of one model, or of several in turns, in eval mode.

    Returns {name: {images_per_second, batch_ms, batch_ms_median}} from the fastest measurement and the median one;
    a single model is called "model". All must be on the same device.
    """
    named = {"model": models} if isinstance(models, nn.Module) else dict(models)
    devices = {p.device for model in named.values() for p in model.parameters()}
    if len(devices) > 1:
        raise InputError(f"parameters on {', '.join(sorted(map(str, devices)))}, expected one device to compare on")
    with ExitStack() as modes:
        for model in named.values():
            modes.enter_context(evaluation_mode(model))
        functions = {name: forward(model, batch_size, input_size=input_size) for name, model in named.items()}
        timings = compare(functions, repeats=repeats, warmup=warmup, device=next(iter(devices), "cpu"), clock=clock)
    return {
        name: {"images_per_second": batch_size / t.min, "batch_ms": 1e3 * t.min, "batch_ms_median": 1e3 * t.median}
        for name, t in timings.items()
    }


def _measure(function: Callable[[], Any], calls: int, wait: Callable[[], None], clock: Clock) -> float:
    wait()
    start = clock()
    for _ in range(calls):
        function()
    wait()
    return clock() - start


def _synchronizer(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
