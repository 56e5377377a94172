"""The CPU kernels of `lowrank_mlp` against plain torch: `pytest bench/micro/lowrank_mlp_cpu.py`.

ViT-B shapes. In turns in one process (`timing.compare`, least of all rounds): the op, four `F.linear` and an
`F.gelu` eagerly, and the same compiled. "peak" is what one core reaches with nothing but multiply-adds between
registers, measured in the same run (FMA in fp32, dpbf16 in bf16 where the CPU has it), times the threads: the floor is
the FLOPs at that rate. The JSON of pytest-benchmark (`--benchmark-json FILE`) holds the figures as `extra_info`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from vitlr.measuring.timing import compare
from vitlr.ops.backends import native
from vitlr.ops.layers.lowrank_mlp import Key, lowrank_mlp, reference, roofline

K, D, N = 768, 3072, 768
ROWS, RANKS = [197, 1576], [64, 128, 256]  # tokens of one image and of eight
ROUNDS = 30


@pytest.fixture(params=[1, 2], ids=lambda count: f"threads={count}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITLR_BACKEND", "cpu")


@pytest.mark.parametrize("r", RANKS, ids=lambda r: f"r={r}")
@pytest.mark.parametrize("M", ROWS, ids=lambda M: f"M={M}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lowrank_mlp(
    benchmark: Callable, capsys: pytest.CaptureFixture, dtype: torch.dtype, M: int, r: int, threads: int
) -> None:
    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

    sizes = ((r, K), (D, r), (D,), (r, D), (N, r), (N,))
    args = (torch.randn(M, K).to(dtype), *(tensor(*size) for size in sizes), None, "gelu")
    torch.compiler.reset()
    compiled = torch.compile(reference, fullgraph=True)
    functions = {
        "vitlr": lambda: lowrank_mlp(*args),
        "eager": lambda: reference(*args),
        "compiled": lambda: compiled(*args),
    }
    with torch.inference_mode():
        _check(args)
        times = compare(functions, repeats=ROUNDS)
        peak = threads * native.peak(dtype)
        flops = roofline(Key(M, K, D, N, r, r)).flops
        ours, best = times["vitlr"].min, min(times["eager"].min, times["compiled"].min)
        benchmark.group = f"{dtype} M={M} r={r} threads={threads}"
        benchmark.extra_info.update(
            isa=native.isa_used(), ratio_to_best_torch=best / ours, ms=1e3 * ours, share_of_peak=flops / ours / peak
        )
        with capsys.disabled():
            print(
                f"\n{dtype} M={M} r={r} threads={threads}: {1e3 * ours:.3f} ms, {flops / ours / 1e9:.0f} GFLOP/s, "
                f"{flops / ours / peak:.0%} of {peak / 1e9:.0f}; {best / ours:.2f}x the best of torch "
                f"(eager {1e3 * times['eager'].min:.3f} ms, compiled {1e3 * times['compiled'].min:.3f} ms)"
            )
        benchmark.pedantic(functions["vitlr"], rounds=ROUNDS, warmup_rounds=2)


def _check(args: tuple) -> None:
    """No number is printed for a kernel that is wrong."""
    exact = reference(*(arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args))
    error, theirs = ((f(*args).double() - exact).abs().max() for f in (lowrank_mlp, reference))
    assert error <= 2 * theirs + 1e-6
