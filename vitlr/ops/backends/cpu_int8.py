"""Chains of integers on the CPU, and attention between two of them: blocks of rows in cache, of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vitlr.ops.backends import native, packed
from vitlr.ops.backends.cpu import ACTIVATIONS
from vitlr.ops.dispatch import registry
from vitlr.ops.layers import int8_attention, int8_chain

_RAN_ON = ("Sapphire Rapids (AMX, AVX-512, AVX-VNNI, AVX2)", "Zen 4 (AVX-512)")


def _ready_chain(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor],
    multipliers: Sequence[Tensor], shifts: Sequence[Tensor], wides: Sequence[Tensor | None], residual: Tensor | None,
    acts: Sequence[str], norm: Sequence[Tensor] = (), eps: float = 0.0,
) -> registry.Prepared:  # fmt: skip
    isa = native.isa_used()
    kept: list[Any] = []
    steps = map(int8_chain.Step, codes, scales, biases, multipliers, shifts, wides)
    layers = [_layer(step, act, isa, kept) for step, act in zip(steps, acts, strict=True)]
    N, moments = codes[-1].shape[0], _norm(norm, eps, kept)

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return native.int8_chain(rows, layers, N, _rows(residual, N), isa, moments).view(*x.shape[:-1], N)

    return registry.Prepared(run, native.isa_used, kept)


def _ready_attention(
    x: Tensor, norm: Sequence[Tensor], qkv: Sequence[Tensor | None], proj: Sequence[Tensor | None],
    residual: Tensor | None, heads: int, query_keys: Sequence[int], eps: float,
) -> registry.Prepared:  # fmt: skip
    isa = native.isa_used()
    kept: list[Any] = []
    before, after = int8_attention.steps(qkv), int8_attention.steps(proj)
    layers = tuple([_layer(step, "none", isa, kept) for step in side] for side in (before, after))
    width, N = after[0].channels // heads, after[-1].codes.shape[0]
    moments, starts = _norm(norm, eps, kept), list(accumulate(query_keys, initial=0)) if query_keys else []

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        rows = _rows(residual, N)
        return native.int8_attention(x.contiguous(), heads, width, layers, N, rows, isa, moments, starts)

    return registry.Prepared(run, native.isa_used, kept)


def _chain(x: Tensor, *rest: Any) -> Tensor:
    return _ready_chain(x, *rest)(x, rest[6])


def _attention(x: Tensor, *rest: Any) -> Tensor:
    return _ready_attention(x, *rest)(x, rest[3])


def _layer(step: int8_chain.Step, act: str, isa: str, kept: list[Any]) -> tuple:
    W, *floats = step[:-1]
    scale, bias, multiplier, shift = (t.contiguous() for t in floats)
    panels = packed.int8(W, isa)
    wide = None if step.wide is None else step.wide.contiguous()
    kept += [panels, scale, bias, multiplier, shift, wide]
    more = (0, 0) if wide is None else (wide.data_ptr(), len(wide))
    pointers = (bias.data_ptr(), ACTIVATIONS[act], multiplier.data_ptr(), shift.data_ptr(), *more)
    return (panels.fields[0], scale.data_ptr(), *W.shape, *pointers)


def _norm(norm: Sequence[Tensor], eps: float, kept: list[Any]) -> tuple[int, int, float]:
    if not norm:
        return native.NO_NORM
    gamma, beta = (t.contiguous() for t in norm)
    kept += [gamma, beta]
    return gamma.data_ptr(), beta.data_ptr(), eps


def _rows(residual: Tensor | None, N: int) -> Tensor | None:
    if residual is None:
        return None
    residual = residual.reshape(-1, N)
    return residual if residual.stride(1) == 1 else residual.contiguous()


def _supports(key: int8_chain.Key | int8_attention.Key) -> str | None:
    if key.device.type != "cpu":
        return f"x is on {key.device}, the kernel runs on the CPU"
    if key.dtype not in (torch.float32, torch.bfloat16):
        return f"x and y are fp32 or bf16 there, x is {key.dtype}"
    return "a size is 0" if 0 in key.widths else native.why_not()


registry.register(int8_chain.OP, registry.Candidate("cpu", _supports, _chain, _RAN_ON, prepare=_ready_chain))
registry.register(
    int8_attention.OP, registry.Candidate("cpu", _supports, _attention, _RAN_ON, prepare=_ready_attention)
)
