"""The CPU kernels of `int8_chain` against fp32 and bf16: `pytest bench/micro/int8_chain.py`.

Shapes of ViT-Ti and ViT-B, in turns in one process (`timing.compare`, least of all rounds): the op on x in fp32 and in
bf16, and the same linears of torch in both. "peak" is what one core reaches with nothing but products of bytes between
registers, measured in the same run, times the threads. The JSON of pytest-benchmark (`--benchmark-json FILE`) holds the
figures as `extra_info`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vitlr.measuring.timing import compare
from vitlr.ops.backends import native
from vitlr.ops.layers.activations import ACTIVATIONS
from vitlr.ops.layers.int8_chain import Key, Step, int8_chain, reference, roofline

SHAPES = {
    "ViT-B qkv": (768, 2304),
    "ViT-B proj": (768, 768),
    "ViT-B MLP": (768, 3072, 768),
    "ViT-B qkv, r=192": (768, 192, 2304),
    "ViT-Ti qkv": (192, 576),
    "ViT-Ti MLP": (192, 768, 192),
}
ROWS = [197, 1576]  # tokens of one image and of eight
ROUNDS = 30


@pytest.mark.parametrize("threads", [1, 2], ids=lambda count: f"threads={count}")
@pytest.mark.parametrize("M", ROWS, ids=lambda M: f"M={M}")
@pytest.mark.parametrize("layer", SHAPES)
def test_int8_chain(benchmark: Callable, capsys: pytest.CaptureFixture, layer: str, M: int, threads: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    widths = SHAPES[layer]
    steps = [_step(K, N) for K, N in pairwise(widths)]
    acts = ["gelu" if "MLP" in layer and step is steps[0] else "none" for step in steps]
    x = torch.randn(M, widths[0])
    functions: dict[str, Callable[[], Tensor]] = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        functions[f"bytes, x in {name}"] = partial(int8_chain, x.to(dtype), steps, acts)
        weights = [(torch.randn_like(step.codes, dtype=dtype), step.bias.to(dtype)) for step in steps]
        functions[f"torch {name}"] = partial(_floats, x.to(dtype), weights, acts)
    with torch.inference_mode():
        _check(x[:64], steps, acts)
        times = compare(functions, repeats=ROUNDS)
        peak = threads * native.peak(torch.int8)
        operations = roofline(Key(M, widths, tuple(acts))).flops
        ours = times["bytes, x in bf16"].min
        benchmark.group = f"{layer} M={M} threads={threads}"
        benchmark.extra_info.update(
            isa=native.isa_used(),
            share_of_peak=operations / ours / peak,
            **{f"ms, {name}": 1e3 * t.min for name, t in times.items()},
        )
        with capsys.disabled():
            told = ", ".join(f"{name} {1e3 * t.min:.3f} ms" for name, t in times.items())
            print(f"\n{layer} M={M} threads={threads} {native.isa_used()}: {operations / ours / 1e9:.0f} GOP/s, "
                  f"{operations / ours / peak:.0%} of {peak / 1e9:.0f}; {told}")  # fmt: skip
        benchmark.pedantic(functions["bytes, x in bf16"], rounds=ROUNDS, warmup_rounds=2)


def _step(K: int, N: int) -> Step:
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    scale = torch.full((N,), 1 / (30 * 74 * K**0.5))
    bias = -scale * codes.float().sum(1) * 128
    return Step(codes, scale, bias, torch.full((K,), 30.0), torch.full((K,), 128.0))


def _floats(x: Tensor, weights: list[tuple[Tensor, Tensor]], acts: list[str]) -> Tensor:
    for (W, b), act in zip(weights, acts, strict=True):
        x = ACTIVATIONS[act][0](torch.nn.functional.linear(x, W, b))
    return x


def _check(x: Tensor, steps: list[Step], acts: list[str]) -> None:
    """No number is printed for a kernel that is wrong."""
    columns = [list(column) for column in zip(*steps, strict=True)]
    exact = reference(x.double(), *columns, None, acts)
    assert (int8_chain(x, steps, acts) - exact).norm() <= 1e-3 * exact.norm()
