"""The low-rank linear against two `F.linear` and against the dense layer: `pytest bench/micro/lowrank_linear.py`.

Every candidate that can run here takes turns with plain torch's two products and with the dense layer in one process
(`timing.compare`); the ratios are of the fastest turns, above 1 where the candidate is faster. The floor is the
roofline of one fused pass: of the card's measured ceilings on a GPU, elsewhere at the rate at which the dense product
of this shape runs here (`r (K + N) / (K N)` of its time). pytest-benchmark's own table times each of them apart; its
JSON (`--benchmark-json FILE`) holds ratios and floors as `extra_info`.
On a GPU the arguments rotate through more memory than the L2 cache holds, and a CUDA graph replaces the launches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlr import ops
from vitlr.measuring.timing import compare
from vitlr.ops.dispatch.ceilings import ceilings_of
from vitlr.ops.layers.activations import ACTIVATIONS
from vitlr.ops.layers.lowrank_linear import Key, reference, roofline

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# Tokens of 1, 8, 64 and 256 images; the linears of ViT-B; ranks around the best and beyond registers
ROWS = [197, 1576, 12608, 50432] if ON_GPU else [197, 1576]
LAYERS = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}
RANKS = [64, 128, 192, 256] if ON_GPU else [64, 128]
ROUNDS = 60 if ON_GPU else 20
ROTATED_BYTES = 256 * 2**20 if ON_GPU else 0
VARIANTS = [candidate.name for candidate in ops.candidates("lowrank_linear")]


@pytest.mark.parametrize("act", ["none", "gelu"])
@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", [*VARIANTS, "dense"])
@torch.inference_mode()
def test_lowrank_linear(
    benchmark: Callable, capsys: pytest.CaptureFixture, name: str, layer: str, r: int, M: int, act: str
) -> None:
    K, N = LAYERS[layer]
    key = Key(M, K, N, r, True, act, False, DTYPE, DEVICE)
    benchmark.group = f"{layer} {K}->{N} r={r} M={M} {act} {str(DTYPE).removeprefix('torch.')}"
    run = _dense() if name == "dense" else _candidate(name, key)
    size = DTYPE.itemsize * M * (K + N)
    sets = [_arguments(M, K, N, r) for _ in range(1 + ROTATED_BYTES // size)]
    if name != "dense":
        _check(run, sets[0], act)
    functions = {
        "ours": _timed(run, sets, act),
        "two": _timed(lambda x, W, B, A, bias, act: reference(x, B, A, bias, None, act), sets, act),
        "dense": _timed(_dense(), sets, act),
    }
    ours, two, dense = compare(functions, repeats=ROUNDS, device=DEVICE).values()
    floor = roofline(Key(M, K, N, r, dtype=DTYPE), ceilings_of(DEVICE))
    floor_us = floor.floor_us or 1e6 * dense.min * r * (K + N) / (K * N)
    us = 1e6 * ours.min
    benchmark.extra_info.update(
        us=us, floor_us=floor_us, of_floor=floor_us / us, ratio_to_two=two.min / ours.min,
        ratio_to_dense=dense.min / ours.min, chosen=ops.select("lowrank_linear", key).name,
    )  # fmt: skip
    with capsys.disabled():
        print(
            f"\n{name:16} {benchmark.group}: {us:.1f} µs, floor {floor_us:.1f}, {floor.flops / us / 1e6:.2f} TFLOP/s, "
            f"{two.min / ours.min:.2f}x two F.linear, {dense.min / ours.min:.2f}x dense"
        )
    benchmark.pedantic(functions["ours"], rounds=ROUNDS, warmup_rounds=2)


def _arguments(M: int, K: int, N: int, r: int) -> tuple[Tensor, ...]:
    """x, W, B, A, bias; random, because zeros run faster on real hardware."""
    shapes = (M, K), (N, K), (r, K), (N, r), (N,)
    x, W, B, A, bias = (torch.randn(shape, device=DEVICE) for shape in shapes)
    return tuple(t.to(DTYPE) for t in (x, W / K**0.5, B / K**0.5, A / r**0.5, bias))


def _candidate(name: str, key: Key) -> Callable[..., Tensor]:
    (candidate,) = (candidate for candidate in ops.candidates("lowrank_linear") if candidate.name == name)
    refusal = candidate.supports(key)
    if refusal is not None:
        pytest.skip(f"{name}: {refusal}")
    return lambda x, W, B, A, bias, act: candidate.run(x, B, A, bias, None, act)


def _dense() -> Callable[..., Tensor]:
    return lambda x, W, B, A, bias, act: ACTIVATIONS[act][0](F.linear(x, W, bias))


def _timed(run: Callable[..., Tensor], sets: list[tuple[Tensor, ...]], act: str) -> Callable[[], object]:
    """A function that runs on the next arguments; on a GPU one graph for each, so that no launch is timed."""
    calls = [lambda args=args: run(*args, act) for args in sets]
    if ON_GPU:
        calls = [_graph(call) for call in calls]
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def _graph(call: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and chooses before the capture
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _check(run: Callable[..., Tensor], args: tuple[Tensor, ...], act: str) -> None:
    """No number is printed for a kernel that is wrong."""
    x, _, B, A, bias = args
    exact = reference(*(t.double() for t in (x, B, A, bias)), None, act)
    allowed = 2 * (reference(x, B, A, bias, None, act) - exact).abs().max() + 1e-6
    assert (run(*args, act) - exact).abs().max() <= allowed
