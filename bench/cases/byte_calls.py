"""Calls of the ops of bytes with random arguments: chains of 8-bit floats and of integers, attention between two."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.calls import Call, Random
from vitlr.ops.layers import attention
from vitlr.ops.layers import fp8_chain as fp8_op
from vitlr.ops.layers import int8_chain as int8_op
from vitlr.ops.layers.activations import ACTIVATIONS

Acts = Sequence[str]


def fp8_chain(
    M: int, widths: Sequence[int], acts: Acts, dtype: torch.dtype, device: torch.device, residual: bool = False,
    norm: bool = False,
) -> Call:  # fmt: skip
    """`fp8_chain` with biases, from widths[0] to widths[-1]."""

    def make(seed: int) -> tuple:
        new, exact = Random(seed, dtype, device), Random(seed + 1, torch.float32, device)
        steps = [fp8_op.step_of(exact(N, K, fan_in=K), exact(N)) for K, N in pairwise(widths)]
        extra = new(M, widths[-1]) if residual else None
        return new(M, widths[0]), *_columns(steps), extra, list(acts), _norm(new, widths[0], norm), 1e-5

    return Call("fp8_chain", _label(M, widths, acts, dtype, residual, norm), make)


def int8_chain(
    M: int, widths: Sequence[int], acts: Acts, dtype: torch.dtype, device: torch.device, residual: bool = False,
    norm: bool = False, more: int = 0,
) -> Call:  # fmt: skip
    """`int8_chain` whose inputs use most of their range; `more` channels of each step have a further column."""

    def make(seed: int) -> tuple:
        new, exact = Random(seed, dtype, device), Random(seed + 1, torch.float32, device)
        steps = [_step(exact, K, N, more) for K, N in pairwise(widths)]
        extra = new(M, widths[-1]) if residual else None
        return new(M, widths[0]), *_columns(steps), extra, list(acts), _norm(new, widths[0], norm), 1e-5

    return Call("int8_chain", _label(M, widths, acts, dtype, residual, norm, more), make, _meant)


def int8_attention(images: int, tokens: int, width: int, heads: int, dtype: torch.dtype, device: torch.device) -> Call:
    """`int8_attention` of a whole half of a block: norm, qkv, attention, proj, residual."""

    def make(seed: int) -> tuple:
        new, exact = Random(seed, dtype, device), Random(seed + 1, torch.float32, device)
        qkv, proj = _step(exact, width, 3 * width, 0), _step(exact, width, width, 0)
        x = new(images, tokens, width)
        return x, _norm(new, width, True), [*qkv], [*proj], x, heads, [], 1e-5

    label = f"{width} in {heads} heads M={images}x{tokens} {_name(dtype)}"
    return Call("int8_attention", label, make, _attention_meant)


def _meant(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor],
    multipliers: Sequence[Tensor], shifts: Sequence[Tensor], wides: Sequence[Tensor | None], residual: Tensor | None,
    acts: Acts, norm: Sequence[Tensor] = (), eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """`int8_chain` without rounding: where a last bit moves a byte to its neighbour, nobody is wrong."""
    y = F.layer_norm(x, x.shape[-1:], *(part.double() for part in norm), eps) if norm else x
    for *floats, wide, act in zip(codes, scales, biases, multipliers, shifts, wides, acts, strict=True):
        W, scale, bias, multiplier, shift = (part.double() for part in floats)
        y = y if wide is None else torch.cat([y, y[..., wide]], -1)
        q = (y * multiplier + shift).clamp(0, int8_op.LARGEST)
        y = ACTIVATIONS[act][0](F.linear(q, W) * scale + bias)
    return y if residual is None else y + residual


def _attention_meant(
    x: Tensor, norm: Sequence[Tensor], qkv: Sequence[Tensor], proj: Sequence[Tensor], residual: Tensor, heads: int,
    query_keys: Sequence[int], eps: float,
) -> Tensor:  # fmt: skip
    """`int8_attention` likewise, of one step on each side."""
    before, after = ([[part] for part in side] for side in (qkv, proj))
    y = _meant(x, *before, None, ["none"], norm, eps)  # type: ignore[call-arg,arg-type]
    q, k, v = y.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return _meant(attention.reference(q, k, v), *after, residual, ["none"])  # type: ignore[call-arg,arg-type]


def _step(new: Random, K: int, N: int, more: int) -> int8_op.Step:
    wide = None
    if more:
        wide = torch.arange(0, K, max(1, K // more), device=new(1).device, dtype=torch.int32)[:more]
    columns = K + more
    W = (40 * new(N, columns)).round().clamp(-127, 127).to(torch.int8)
    multiplier = 40 + 5 * new(columns).tanh()
    scale = (1 + 0.3 * new(N).tanh()) / (1600 * columns**0.5)
    shift = 128 + 10 * new(columns)
    return int8_op.Step(W, scale, new(N) - scale * (W.float() @ shift), multiplier, shift, wide)


def _columns(steps: Sequence[tuple]) -> list[list[Tensor | None]]:
    return [list(column) for column in zip(*steps, strict=True)]


def _norm(new: Random, K: int, norm: bool) -> list[Tensor]:
    return [1 + 0.1 * new(K), 0.1 * new(K)] if norm else []


def _label(
    M: int, widths: Sequence[int], acts: Acts, dtype: torch.dtype, residual: bool, norm: bool, more: int = 0
) -> str:
    act = next((act for act in acts if act != "none"), "none")
    beside = f"{' after a norm' * norm}{f' +{more} columns' if more else ''}{' +residual' * residual}"
    return f"{'-'.join(map(str, widths))} M={M} {act}{beside} {_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
