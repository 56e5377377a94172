"""The Gram update against torch's fp32 GEMM of the same product: `pytest bench/micro/gram.py`.

The ratio is that of two functions taking turns in one process (`timing.compare`, least of all rounds):
`torch.mm(Xᵀ, X)` in fp32, which does twice the work, keeps fp32 sums and adds nothing up, over `gram_update_`. The
floor is half of the GEMM's time, the triangle at the GEMM's own FLOP rate: a ratio of 2. pytest-benchmark's own
table times each of them apart; its JSON (`--benchmark-json FILE`) holds the ratios as `extra_info`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from vitlr.measuring.timing import compare
from vitlr.ops.backends import native
from vitlr.ops.linalg.gram import Key, gram_update_, roofline

# (n, T): widths of ViT-B and ViT-Ti, tokens of 8 and 32 images
SHAPES = [(768, 1576), (192, 1576), (192, 6304)]
ROUNDS = 60


@pytest.fixture(params=[1, 2], ids=lambda count: f"threads={count}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("n", "T"), SHAPES, ids=lambda size: str(size))
@pytest.mark.parametrize("what", ["gram", "gram weighted", "torch.mm"])
def test_gram(benchmark: Callable, capsys: pytest.CaptureFixture, n: int, T: int, threads: int, what: str) -> None:
    X, weight = torch.randn(T, n), torch.rand(T)
    C, out = torch.zeros(n, n, dtype=torch.float64), torch.empty(n, n)
    functions = {
        "gram": lambda: gram_update_(C, X),
        "gram weighted": lambda: gram_update_(C, X, weight),
        "torch.mm": lambda: torch.mm(X.mT, X, out=out),
    }
    _check(X)
    benchmark.group = f"gram n={n} T={T} threads={threads}"
    if what != "torch.mm":
        ours, mm = compare({"ours": functions[what], "mm": functions["torch.mm"]}, repeats=ROUNDS).values()
        flops, ratio = roofline(Key(T, n)).flops, mm.min / ours.min
        benchmark.extra_info.update(
            isa=native.build_info()["isa_used"], ratio_to_mm=ratio, ms=1e3 * ours.min, floor_ms=1e3 * mm.min / 2
        )
        with capsys.disabled():
            print(
                f"\n{what:13} n={n} T={T} threads={threads}: {1e3 * ours.min:.3f} ms, floor {1e3 * mm.min / 2:.3f}, "
                f"{flops / ours.min / 1e9:.0f} GFLOP/s, {ratio:.2f}x torch.mm ({1e3 * mm.min:.3f} ms)"
            )
    benchmark.pedantic(functions[what], rounds=ROUNDS, warmup_rounds=2)


def _check(X: torch.Tensor) -> None:
    """No number is printed for a kernel that is wrong."""
    C = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    gram_update_(C, X)
    exact = X.double().mT @ X.double()
    assert (C - exact).abs().max() <= 1e-6 * exact.abs().max()
