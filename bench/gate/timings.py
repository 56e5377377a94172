"""The gate's second question: how fast is every kernel, against dense cuBLAS and against two GEMMs?

Every candidate of a call takes turns with the dense layer that it replaces; two shapes also with what
`torch.compile(mode="max-autotune-no-cudagraphs")` makes of both. When the time given is spent, the rest is left out and
named. A row that raises is named, too, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench.cases import calls
from bench.cases.calls import Call
from bench.cases.clock import input_sets, microseconds
from bench.cases.shapes import geometry
from vitlr.ops.dispatch import measured, registry

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Timed:
    """A call, the dense layer that it replaces, and whether compiled versions are timed as well."""

    call: Call
    dense: Callable[..., Any] | None
    dense_inputs: Callable[[int], tuple] | None
    compiled: bool = False


def grid(device: torch.device) -> Iterator[Timed]:
    """ViT-B first, then other operations and models; what torch.compile tunes for a minute comes last."""
    for batch in (64, 256, 1, 8):
        for r in (64, 128, 256):
            yield _mlp("vit_base_patch16_224", batch, r, device)
            for layer in ("qkv", "proj", "fc1", "fc2"):
                yield _linear("vit_base_patch16_224", layer, batch, r, device)
    for form, group in (("int8", 64), ("int4", 64), ("fp8", 128), ("blockdiag", 64)):
        for batch in (1, 64):
            M = 197 * batch
            call = calls.residual_linear(M, 768, 2304, 32, form, group, BF16, device)
            yield Timed(call, F.linear, _dense_linear(M, 768, 2304, BF16, device))
    for model in ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"):
        for batch in (8, 64):
            yield _mlp(model, batch, 64 if "tiny" in model or "small" in model else 192, device)
    giant = geometry("vit_giant_patch14_dinov2")
    for packed in (True, False):
        M = 8 * giant.tokens
        yield Timed(calls.glu(M, giant.width, giant.hidden, giant.width, 128, 128, BF16, device, packed), None, None)
    for n, T in ((768, 12608), (192, 12608)):
        for dtype in (BF16, torch.float32):
            call = calls.gram(T, n, dtype, device)
            yield Timed(call, lambda X: X.float().mT @ X.float(), lambda seed, c=call: (c.make(seed)[1],))
    yield Timed(calls.chain(48, 768, 768, torch.float32, device), None, None)
    yield Timed(calls.chain(48, 768, 768, torch.float64, device), None, None)
    yield _mlp("vit_base_patch16_224", 64, 128, device, compiled=True)
    yield _linear("vit_base_patch16_224", "fc1", 64, 128, device, compiled=True)


def rehearsal(device: torch.device) -> Iterator[Timed]:
    """One tiny call a kind, so that the script itself can be tried without a GPU."""
    f32 = torch.float32
    yield Timed(calls.linear(40, 32, 48, 16, f32, device), F.linear, _dense_linear(40, 32, 48, f32, device), True)
    yield Timed(calls.mlp(40, 32, 64, 32, 16, 16, f32, device), _dense_mlp, _dense_mlp_inputs(40, 32, 64, f32, device))
    yield Timed(calls.gram(64, 32, f32, device), None, None)


def _mlp(model: str, batch: int, r: int, device: torch.device, compiled: bool = False) -> Timed:
    g = geometry(model)
    M = batch * g.tokens
    call = calls.mlp(M, g.width, g.hidden, g.width, r, r, BF16, device)
    return Timed(call, _dense_mlp, _dense_mlp_inputs(M, g.width, g.hidden, BF16, device), compiled)


def _linear(model: str, layer: str, batch: int, r: int, device: torch.device, compiled: bool = False) -> Timed:
    g = geometry(model)
    K, N = {"qkv": (g.width, 3 * g.width), "proj": (g.width, g.width), "fc1": (g.width, g.hidden)}.get(
        layer, (g.hidden, g.width)
    )
    M = batch * g.tokens
    return Timed(calls.linear(M, K, N, r, BF16, device), F.linear, _dense_linear(M, K, N, BF16, device), compiled)


def _dense_linear(M: int, K: int, N: int, dtype: torch.dtype, device: torch.device) -> Callable[[int], tuple]:
    def make(seed: int) -> tuple:
        new = calls.Random(seed, dtype, device)
        return new(M, K), new(N, K, fan_in=K), new(N)

    return make


def _dense_mlp_inputs(M: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> Callable[[int], tuple]:
    def make(seed: int) -> tuple:
        new = calls.Random(seed, dtype, device)
        return new(M, K), new(D, K, fan_in=K), new(D), new(K, D, fan_in=D), new(K)

    return make


def _dense_mlp(x: Any, W1: Any, b1: Any, W2: Any, b2: Any) -> Any:
    return F.linear(F.gelu(F.linear(x, W1, b1)), W2, b2)


def run(
    device: torch.device, seconds: float, every: Iterator[Timed], wrong: frozenset[tuple[str, str]] = frozenset()
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows {op, call, key, us, floor_us, candidates}, and what there was no time for or raised.

    `wrong`: (op, candidate) that are not right and so are not timed.
    """
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    for timed in every:
        label = f"{timed.call.op} {timed.call.label}"
        if time.monotonic() > end:
            left.append(label)
            continue
        try:
            row = _row(timed, device, wrong)
        except Exception as cause:  # out of memory, a failed launch: the other rows are still wanted
            left.append(f"{label}: {type(cause).__name__}: {str(cause)[:200]}")
            continue
        # A shape that is timed once more, with compiled versions, replaces its first row.
        rows = [old for old in rows if (old["op"], old["key"]) != (row["op"], row["key"])] + [row]
    return rows, left


def _row(timed: Timed, device: torch.device, wrong: frozenset[tuple[str, str]]) -> dict[str, Any]:
    call = timed.call
    sets = input_sets(call.make, device)
    key = call.key(sets[0])
    candidates = {name: run for name, run in call.candidates(sets[0]).items() if (call.op, name) not in wrong}
    functions = dict(candidates)
    if timed.compiled:
        functions["torch compiled"] = _compiled(candidates["torch"], sets[0], device)
    inputs = dict.fromkeys(functions, sets)
    if timed.dense is not None and timed.dense_inputs is not None:
        dense_sets = input_sets(timed.dense_inputs, device)
        dense = {"dense": timed.dense}
        if timed.compiled:
            dense["dense compiled"] = _compiled(timed.dense, dense_sets[0], device)
        functions |= dense
        inputs |= dict.fromkeys(dense, dense_sets)
    us = microseconds(functions, inputs, device)
    if timed.compiled:
        torch.compiler.reset()
    return {
        "op": call.op,
        "call": call.label,
        "key": measured.describe(key),
        "us": {name: round(value, 3) for name, value in us.items()},
        "floor_us": registry._ops[call.op].roofline(key, registry.ceilings_of(device)).floor_us,
        "candidates": list(candidates),
    }


def _compiled(function: Callable[..., Any], inputs: tuple, device: torch.device) -> Callable[..., Any]:
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    compiled = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
    compiled(*inputs)
    return compiled


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; ratios are those of the dense layer's time."""
    lines = ["| op | call | floor µs | µs (times as fast as dense) |", "|---|---|---|---|"]
    for row in rows:
        dense = row["us"].get("dense")
        cells = [
            f"{name} {us:.1f}" + (f" ({dense / us:.2f}x)" if dense and not name.startswith("dense") else "")
            for name, us in sorted(row["us"].items(), key=lambda item: item[1])
        ]
        floor = "" if row["floor_us"] is None else f"{row['floor_us']:.1f}"
        lines.append(f"| {row['op']} | {row['call']} | {floor} | {', '.join(cells)} |")
    return "\n".join(lines)
