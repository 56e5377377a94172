"""Time GPU functions against each other: CUDA graphs, interleaved, inputs rotated past the L2 cache.

One measurement of a function is one replay of a graph that calls it once for every set of inputs. Sets are as many as
make their bytes exceed twice the L2 cache, so that no call finds its inputs there. On a CPU the same interface times
plain calls, so that the scripts which use it can be rehearsed without a GPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitlr.measuring.timing import compare

Inputs = tuple[Any, ...]


def input_sets(make: Callable[[int], Inputs], device: torch.device, most: int = 64) -> list[Inputs]:
    """`make(seed)` as often as it takes for the inputs to exceed twice the L2 cache (8 to `most` sets, CPU: one).

    At least eight, so that one replay of a graph is long beside the gap before it.
    """
    first = make(0)
    if device.type != "cuda":
        return [first]
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, Tensor))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return [first, *(make(seed) for seed in range(1, max(8, min(most, math.ceil(2 * cache / max(size, 1))))))]


def microseconds(
    functions: Mapping[str, Callable[..., Any]],
    sets: Sequence[Inputs] | Mapping[str, Sequence[Inputs]],
    device: torch.device,
    rounds: int = 20,
    graphs: bool = True,
) -> dict[str, float]:
    """The median time of one call of each function, in µs, over rounds in which all of them take turns.

    `sets` are those of all functions, or of each by name. With `graphs=False` calls are launched one after the other,
    as in eager use.
    """
    of = dict(sets) if isinstance(sets, Mapping) else dict.fromkeys(functions, sets)
    runs = {name: prepared(f, of[name], device, graphs) for name, f in functions.items()}
    return in_turns(runs, {name: len(of[name]) for name in runs}, device, rounds)


def prepared(
    function: Callable[..., Any], sets: Sequence[Inputs], device: torch.device, graphs: bool = True
) -> Callable[[], Any]:
    """One call of a function for every set: a replay of its graph, or as in eager use."""
    return _graph(function, sets).replay if graphs and device.type == "cuda" else _loop(function, sets)


def in_turns(
    runs: Mapping[str, Callable[[], Any]], calls: Mapping[str, int], device: torch.device, rounds: int = 20
) -> dict[str, float]:
    """The median time in µs of one of the `calls` that a run makes, over rounds in which all runs take turns."""
    if device.type != "cuda":
        found = compare(dict(runs), repeats=3, warmup=1, min_seconds=0.0)
        return {name: 1e6 * timing.median / calls[name] for name, timing in found.items()}
    warm = time.monotonic() + 0.1  # the card's clock idles between measurements
    while time.monotonic() < warm:
        for run in runs.values():
            run()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            runs[name]()
            end.record()
            end.synchronize()
            times[name].append(1e3 * start.elapsed_time(end) / calls[name])
        order.append(order.pop(0))
    return {name: statistics.median(values) for name, values in times.items()}


def _loop(function: Callable[..., Any], sets: Sequence[Inputs]) -> Callable[[], None]:
    def run() -> None:
        for inputs in sets:
            function(*inputs)

    return run


def _graph(function: Callable[..., Any], sets: Sequence[Inputs]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lazy initialisation and compilation happen here, outside the capture
        for _ in range(2):
            _loop(function, sets)()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _loop(function, sets)()
    return graph
