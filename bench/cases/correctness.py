"""The gate's first question: does every kernel that can run here compute what its specification says?

Each candidate of each op against the specification in fp64, by the tolerance of the tests: twice the distance of plain
torch in the same dtype. Freed memory is filled with NaN before a call, so that what a kernel leaves unwritten shows.
Without a GPU the kernels run in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import calls
from bench.cases.calls import Call

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from tolerance import assert_close_to

PARTS = 24
ROWS = 4096


def small(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Ragged shapes, every activation and form: what takes seconds in the interpreter."""
    for M in (1, 63, 197):
        yield calls.linear(M, 100, 90, 24, dtype, device)
    for act in ("gelu", "gelu_tanh", "silu", "relu"):
        yield calls.linear(63, 64, 96, 40, dtype, device, act, residual=True)
        yield calls.mlp(63, 64, 130, 48, 24, 40, dtype, device, act, residual=act == "gelu")
    yield calls.mlp(70, 64, 96, 48, None, 24, dtype, device)
    yield calls.mlp(70, 64, 96, 48, 24, None, dtype, device)
    for form, group in (("int8", 32), ("int4", 32), ("fp8", 64), ("blockdiag", 32)):
        yield calls.residual_linear(63, 128, 96, 24, form, group, dtype, device)
    for weighted in (False, True):
        yield calls.gram(150, 70, dtype, device, weighted)
    yield calls.chain(2, 40, 72, torch.float32, device)
    for packed in (False, True):
        yield calls.glu(63, 64, 80, 48, 24, 40, dtype, device, packed, residual=packed)
    yield calls.glu(63, 64, 80, 48, None, 24, dtype, device)


def large(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Shapes of ViT-B, whole and ragged."""
    for M in (1, 197, 1000, 12608):
        for r in (64, 128, 192, 256):
            yield calls.linear(M, 768, 3072, r, dtype, device, "gelu", residual=True)
            yield calls.linear(M, 3072, 768, r, dtype, device)
            yield calls.mlp(M, 768, 3072, 768, r, r, dtype, device)
    for r1, r2 in ((96, 160), (None, 128), (128, None)):
        yield calls.mlp(1000, 768, 3000, 768, r1, r2, dtype, device, residual=True)
    for form, group in (("int8", 64), ("int4", 64), ("fp8", 128), ("blockdiag", 64)):
        for r in (16, 64, 128):
            yield calls.residual_linear(1000, 768, 2304, r, form, group, dtype, device)
    for n in (192, 768):
        yield calls.gram(5000, n, dtype, device, weighted=True)
    yield calls.chain(8, 768, 768, torch.float32, device)
    for b, m, k in ((8, 768, 768), (3, 197, 130), (50, 64, 100)):
        yield calls.chain(b, m, k, torch.float64, device)
    for r, packed in ((64, True), (64, False), (128, True), (None, False)):
        yield calls.glu(1000, 1536, 4096, 1536, r, 128, dtype, device, packed)


def check(device: torch.device) -> list[dict[str, Any]]:
    """One row a call and candidate: op, call, candidate, problem (None: right)."""
    if device.type != "cuda":
        return _check_part(device.type, 0, 1)
    # Compiling takes most of the time, so processes share it; an illegal access spoils the process that made it alone.
    options: dict[str, Any] = {"max_tasks_per_child": 1} if sys.version_info >= (3, 11) else {}
    rows = []
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), get_context("spawn"), **options) as pool:
        parts = [pool.submit(_check_part, device.type, part, PARTS) for part in range(PARTS)]
        for number, part in enumerate(parts):
            try:
                rows += part.result()
            except Exception as cause:  # the process died, or making the arguments failed after an illegal access
                problem = f"{type(cause).__name__}: {str(cause)[:300]}"
                rows.append({"op": "part", "call": f"{number} of {PARTS}", "candidate": "?", "problem": problem})
    return rows


def _check_part(kind: str, part: int, parts: int) -> list[dict[str, Any]]:
    """Every `parts`-th call, from `part` on."""
    device = torch.device(kind)
    dtypes = [torch.float32, torch.float16, *[torch.bfloat16] * (kind == "cuda")]
    every = [
        call for dtype in dtypes for call in (*small(device, dtype), *(large(device, dtype) if kind == "cuda" else ()))
    ]
    return [row for call in every[part::parts] for row in check_call(call, device)]


def check_call(call: Call, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row a candidate of a call: op, call, candidate, problem (None: right)."""
    args = call.make(0)
    reference = call.reference()
    exact = _run(reference, _double(args))
    plain = _like_many_rows(call, args) if device.type == "cuda" else _run(reference, args)
    for name, run in call.candidates(args).items():
        if name == "torch":
            continue
        row = {"op": call.op, "call": call.label, "candidate": name, "problem": None}
        try:
            _poison(plain, device)
            assert_close_to(_run(run, args), plain, exact)
        except Exception as cause:  # a wrong value and a failed launch alike: the gate lists all of them
            row["problem"] = f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"[:300]
        yield row


def _run(function: Any, args: tuple) -> Tensor:
    """The result; accumulating ops get a fresh accumulator each time."""
    return function(*(arg.clone() if isinstance(arg, Tensor) and index == 0 else arg for index, arg in enumerate(args)))


def _like_many_rows(call: Call, args: tuple) -> Tensor:
    """Plain torch's result as for many rows: for few, cuBLAS splits its sums, and rounds less than any one sum can."""
    x = args[0]
    if not call.op.startswith("lowrank") or len(x) >= ROWS:
        return _run(call.reference(), args)
    times = -(-ROWS // len(x))

    def repeated(arg: Any) -> Any:
        of_rows = isinstance(arg, Tensor) and arg.dim() == 2 and len(arg) == len(x)
        return arg.repeat(times, 1) if of_rows else arg

    return call.reference()(*map(repeated, args))[: len(x)]


def _double(args: tuple) -> tuple:
    return tuple(arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


def _poison(like: Tensor, device: torch.device) -> None:
    """Leave NaN in the memory that an allocation of this size is likely to get next."""
    if device.type == "cuda":
        torch.full_like(like, float("nan"))
        torch.full((4 * like.numel() + 1024,), float("nan"), device=device)
