"""A low-rank MLP against the dense one and against four linears: `pytest bench/micro/lowrank_mlp.py`.

    dense       fc1, GELU, fc2 as the model had them
    four        the specification, four F.linear and F.gelu (`vitlr.ops.lowrank_mlp.reference`)
    op          `vitlr.ops.lowrank_mlp`, by whatever dispatch chooses (VITLR_BACKEND=triton asks for the kernel)

each eager and compiled. Ratios are those of functions taking turns in one process (`timing.compare`, least of
all rounds); pytest-benchmark's own table times each apart, and its JSON (`--benchmark-json FILE`) holds ratio, floor
and candidate as `extra_info`. Without a GPU the shapes are small and the dtype is fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F

from vitlr.measuring.timing import compare
from vitlr.ops import explain
from vitlr.ops.layers.lowrank_mlp import lowrank_mlp, reference

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
# (M, K, D, r): ViT-B at 1, 8, 64 and 256 images; ViT-Ti at one image and eight
SHAPES = (
    [(images * 197, 768, 3072, r) for images in (1, 8, 64, 256) for r in (64, 128, 256)]
    if CUDA
    else [(197, 192, 768, 32), (1576, 192, 768, 32)]
)
ROUNDS = 30


def _functions(M: int, K: int, D: int, r: int) -> Mapping[str, Callable[[], torch.Tensor]]:
    torch.manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(DEVICE, DTYPE)

    x, W1, W2 = torch.randn(M, K).to(DEVICE, DTYPE), make(D, K), make(K, D)
    args = (x, make(r, K), make(D, r), make(D), make(r, D), make(K, r), make(K))

    def dense(x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(F.linear(x, W1, args[3])), W2, args[6])

    eager = {"dense": lambda: dense(x), "four": lambda: reference(*args), "op": lambda: lowrank_mlp(*args)}
    exact = reference(*(arg.double() for arg in args))
    allowed = 2 * (reference(*args).double() - exact).abs().max() + 1e-6
    assert (lowrank_mlp(*args).double() - exact).abs().max() <= allowed, "wrong: nothing is timed"
    compiled_dense, compiled_four = torch.compile(dense), torch.compile(reference)
    compiled_op = torch.compile(lowrank_mlp)
    return {
        **eager,
        "dense compiled": lambda: compiled_dense(x),
        "four compiled": lambda: compiled_four(*args),
        "op compiled": lambda: compiled_op(*args),
    }


def _finished(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    if not CUDA:
        return function

    def run() -> torch.Tensor:
        y = function()
        torch.cuda.synchronize()
        return y

    return run


@pytest.mark.parametrize("what", ["four", "op", "four compiled", "op compiled"])
@pytest.mark.parametrize(("M", "K", "D", "r"), SHAPES, ids=lambda size: str(size))
@torch.no_grad()
def test_lowrank_mlp(
    benchmark: Callable, capsys: pytest.CaptureFixture, M: int, K: int, D: int, r: int, what: str
) -> None:
    functions = {name: _finished(function) for name, function in _functions(M, K, D, r).items()}
    dense = "dense compiled" if what.endswith("compiled") else "dense"
    times = compare({name: functions[name] for name in (what, dense)}, repeats=ROUNDS)
    ratio = times[dense].min / times[what].min
    told = explain("lowrank_mlp", M=M, K=K, D=D, N=K, r1=r, r2=r, dtype=DTYPE, device=DEVICE)
    benchmark.group = f"lowrank_mlp M={M} K={K} D={D} r={r}"
    benchmark.extra_info.update(
        ratio_to_dense=ratio, us=1e6 * times[what].min, floor_us=told.roofline.floor_us, candidate=told.chosen
    )
    floor = "unknown" if told.roofline.floor_us is None else f"{told.roofline.floor_us:.1f}"
    with capsys.disabled():
        print(
            f"\n{what:14} M={M} K={K} D={D} r={r} ({told.chosen if 'op' in what else 'torch'}): "
            f"{1e6 * times[what].min:.0f} µs, floor {floor}, {ratio:.2f}x {dense} ({1e6 * times[dense].min:.0f} µs)"
        )
    benchmark.pedantic(functions[what], rounds=ROUNDS, warmup_rounds=2)
