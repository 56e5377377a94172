"""Triton's candidates of `fp8_chain`, `int8_chain`, `int8_attention`: rows to bytes, then a launch a linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from vitlr.ops.backends import triton
from vitlr.ops.dispatch import floors, registry
from vitlr.ops.layers import attention, fp8_chain, int8_attention, int8_chain

MODULE = "byte_chains"
Key = fp8_chain.Key | int8_chain.Key


def floor(
    key: Key,
    ceilings: registry.Ceilings,
    target: Any = None,
    leave: Callable[[int, int, int], bool] = lambda i, K, N: False,
) -> float | None:
    """The floor in µs: bytes of every launch, or its whole waves of tiles, whose activations count beside products.

    `target`: of `triton_kernels.targets`, in place of the key's device. `leave(i, K, N)`: linears that do not
    count, by their place and widths.
    """
    linear, target = triton.kernels("byte_linear"), target or triton.target_of(key.device)
    form = torch.int8 if isinstance(key, int8_chain.Key) else fp8_chain.FP8
    M, size, steps = key.M or 0, key.dtype.itemsize, len(key.acts)
    total = 1e6 * M * key.widths[0] * (size + 1) / ceilings.bytes_per_s
    for i, ((K, N), act) in enumerate(zip(pairwise(key.widths), key.acts, strict=True)):
        last = i == steps - 1
        if leave(i, K, N):
            continue
        config = linear.config(M, K, N, key.dtype, form, target, last and key.residual)
        tile = config.BM * config.BN
        # A tile of bytes costs half of what its FLOPs would in 16 bits; `issued` counts in those.
        each = max(2 * tile * K, 2 * triton.issued(tile, act, target))
        moved = M * K + N * K + M * N * (size * (1 + key.residual) if last else 1)
        step = floors.in_waves(each, linear.tiles(M, N, config), target.sms, moved, form, ceilings)
        if step is None:
            return None
        total += step
    return total


_signed: Any = WeakIdKeyDictionary()  # codes -> (state, a step as the kernel takes it)


def _run_int8(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor],
    multipliers: Sequence[Tensor], shifts: Sequence[Tensor], wides: Sequence[Tensor | None], residual: Tensor | None,
    acts: Sequence[str], norm: Sequence[Tensor] = (), eps: float = 0.0,
) -> Tensor:  # fmt: skip
    made = [
        _kept(W, scale, bias, wide)
        for W, scale, bias, wide in zip_longest(codes, scales, biases, wides[1:], fillvalue=None)
    ]
    parts = [list(column) for column in zip(*made, strict=True)]
    return triton.kernels(MODULE).run_int8(x, *parts, multipliers, shifts, wides[0], residual, acts, norm, eps)


def _kept(W: Any, scale: Any, bias: Any, wide: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A step as the kernel takes it, made again when torch counts a write to what it was made of."""
    state = tuple(None if t is None else (id(t), t.data_ptr(), _version(t)) for t in (W, scale, bias, wide))
    entry = _signed.get(W)
    if entry is None or entry[0] != state:
        entry = _signed[W] = (state, triton.kernels(MODULE).signed(W, scale, bias, wide))
    return entry[1]


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def _int8_widths(key: int8_chain.Key) -> tuple[tuple[int, ...], torch.dtype]:
    return key.widths, key.dtype


_fp8 = triton.candidate("bytes", MODULE, "fp8", lambda key: (key.widths, key.dtype), "run_fp8", floor=floor)
supports_fp8 = _fp8.supports
registry.register(fp8_chain.OP, _fp8)
_able = triton.candidate("bytes", MODULE, "int8", _int8_widths, "run_int8").supports
registry.register(int8_chain.OP, registry.Candidate("triton.bytes", _able, _run_int8, floor=floor))


def _run_attention(
    x: Tensor, norm: Sequence[Tensor], qkv: Sequence[Tensor | None], proj: Sequence[Tensor | None],
    residual: Tensor | None, heads: int, query_keys: Sequence[int], eps: float,
) -> Tensor:  # fmt: skip
    """A chain, attention as torch has it, in x's dtype, and a chain."""
    q, k, v = int8_attention.split(_through(x, int8_attention.steps(qkv), None, norm, eps), heads, query_keys)
    return _through(attention.reference(q, k, v), int8_attention.steps(proj), residual)


def _through(
    x: Tensor, steps: list[int8_chain.Step], residual: Tensor | None, norm: Sequence[Tensor] = (), eps: float = 0.0
) -> Tensor:
    columns: Any = [list(column) for column in zip(*steps, strict=True)]
    return _run_int8(x, *columns, residual, ["none"] * len(steps), norm, eps)  # type: ignore[call-arg]


def _both_sides(key: int8_attention.Key) -> str | None:
    for widths in (key.before, key.after):
        side = int8_chain.Key(key.M, widths, ("none",) * (len(widths) - 1), dtype=key.dtype, device=key.device)
        if (reason := _able(side)) is not None:
            return reason
    return None


registry.register(int8_attention.OP, registry.Candidate("triton.bytes", _both_sides, _run_attention))
