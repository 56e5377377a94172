"""Does every kernel that can run here compute what its specification says?

Each candidate of each op against the specification in fp64, by the tolerance of the tests: twice the distance of plain
torch in the same dtype. Freed memory is filled with NaN before a call, so that what a kernel leaves unwritten shows.
Without a GPU the kernels run in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import byte_calls, calls
from bench.cases.calls import Call

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from tolerance import assert_close_to

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
    yield calls.chain(2, 40, 72, torch.float32, device)
    for packed in (False, True):
        yield calls.glu(63, 64, 80, 48, 24, 40, dtype, device, packed, residual=packed)
    yield calls.glu(63, 64, 80, 48, None, 24, dtype, device)
    yield byte_calls.fp8_chain(63, (64, 24, 130, 40, 48), ("none", "gelu", "none", "none"), dtype, device, True, True)
    for act in ("gelu_tanh", "silu", "sigmoid", "relu"):
        yield byte_calls.fp8_chain(70, (90, 130, 33), (act, "none"), dtype, device)
        yield byte_calls.int8_chain(70, (90, 130, 33), (act, "none"), dtype, device, True, True, more=3)
    yield byte_calls.int8_chain(63, (64, 24, 130, 40, 48), ("none", "gelu", "none", "none"), dtype, device)
    yield byte_calls.int8_attention(2, 17, 48, 3, dtype, device)


def interpreted() -> list[dict[str, Any]]:
    """One row a call and candidate, in Triton's interpreter: op, call, candidate, problem (None: right)."""
    device = torch.device("cpu")
    every = (call for dtype in (torch.float32, torch.float16) for call in small(device, dtype))
    return [row for call in every for row in check_call(call, device)]


class Fault(Exception):
    """A candidate did something wrong: `kind` says what in one word."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def check_call(call: Call, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row a candidate of a call: op, call, candidate, problem (None: right)."""
    args = call.make(0)
    plain, exact = references(call, args, device)
    for name, run in call.candidates(args).items():
        if name == "torch":
            continue
        row = {"op": call.op, "call": call.label, "candidate": name, "problem": None}
        try:
            judge(run, args, plain, exact, device)
        except Exception as cause:  # a wrong value and a failed launch alike: the gate lists all of them
            row["problem"] = f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"[:300]
        yield row


def references(call: Call, args: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """What plain torch gives in the call's dtype, and the specification in fp64."""
    reference = call.reference()
    exact = _run(reference, _double(args)) if call.meant is None else call.meant(*_double(args))
    return (_like_many_rows(call, args) if device.type == "cuda" else _run(reference, args)), exact


def judge(run: Any, args: tuple, plain: Tensor, exact: Tensor, device: torch.device) -> None:
    """Raises Fault where a candidate leaves NaN or is further from fp64 than the tolerance allows."""
    _poison(plain, device)
    out = _run(run, args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if not torch.isfinite(out).all():
        raise Fault("nan", "NaN or Inf in the result")
    try:
        assert_close_to(out, plain, exact)
    except AssertionError as cause:
        raise Fault("wrong", str(cause)) from cause


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
