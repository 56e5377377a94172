"""Chains of integers on the CPU: the same blocks of rows in cache, of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitlr.ops.backends import native, packed
from vitlr.ops.backends.cpu import ACTIVATIONS
from vitlr.ops.dispatch import registry
from vitlr.ops.layers import int8_chain

_RAN_ON = ("Sapphire Rapids (AMX, AVX-512, AVX-VNNI, AVX2)",)
_MULTIPLIES_BYTES = ("avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8")


def _chain(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor],
    multipliers: Sequence[Tensor], shifts: Sequence[Tensor], wides: Sequence[Tensor | None], residual: Tensor | None,
    acts: Sequence[str],
) -> Tensor:  # fmt: skip
    isa = native.isa_used()
    layers, kept = [], []
    for W, *floats, wide, act in zip(codes, scales, biases, multipliers, shifts, wides, acts, strict=True):
        scale, bias, multiplier, shift = (t.contiguous() for t in floats)
        panels = packed.int8(W, isa)
        wide = None if wide is None else wide.contiguous()
        kept += [panels, scale, bias, multiplier, shift, wide]
        more = (0, 0) if wide is None else (wide.data_ptr(), len(wide))
        pointers = (bias.data_ptr(), ACTIVATIONS[act], multiplier.data_ptr(), shift.data_ptr(), *more)
        layers.append((panels.fields[0], scale.data_ptr(), *W.shape, *pointers))
    N = codes[-1].shape[0]
    if residual is not None:
        residual = residual.reshape(-1, N)
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
    rows = x.reshape(-1, x.shape[-1])
    return native.int8_chain(rows, layers, N, residual, isa).view(*x.shape[:-1], N)


def _supports(key: int8_chain.Key) -> str | None:
    if key.device.type != "cpu":
        return f"x is on {key.device}, the kernel runs on the CPU"
    if key.dtype not in (torch.float32, torch.bfloat16):
        return f"x and y are fp32 or bf16 there, x is {key.dtype}"
    return "a size is 0" if 0 in key.widths else native.why_not()


registry.register(int8_chain.OP, registry.Candidate("cpu", _supports, _chain, _RAN_ON))
