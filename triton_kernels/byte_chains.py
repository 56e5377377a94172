"""Linears of bytes in a row: rows become bytes once, stay bytes from linear to linear, and end as floats.

The arguments are those of the ops `fp8_chain` and `int8_chain`; n linears are n + 1 launches, any rank and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from . import byte_linear, byte_rows
from .byte_linear import FP8, Rows
from .targets import Target


def fp8(widths: Sequence[int], dtype: torch.dtype, target: Target) -> list[byte_linear.Config]:
    """The tiles of each linear, for widths from K to N. Raises Unsupported with the reason."""
    return _configs(widths, dtype, FP8, target)


def int8(widths: Sequence[int], dtype: torch.dtype, target: Target) -> list[byte_linear.Config]:
    """The tiles of each linear, for widths from K to N. Raises Unsupported with the reason."""
    return _configs(widths, dtype, torch.int8, target)


def _configs(widths: Sequence[int], dtype: torch.dtype, form: torch.dtype, target: Target) -> list[byte_linear.Config]:
    byte_rows.config(widths[0], dtype, target)
    return [byte_linear.config(None, K, N, dtype, form, target) for K, N in pairwise(widths)]


def run_fp8(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor | None],
    reaches: Sequence[Tensor], residual: Tensor | None, acts: Sequence[str], norm: Sequence[Tensor] = (),
    eps: float = 0.0, to_fp8: Callable[..., Rows] = byte_linear.to_fp8,
) -> Tensor:  # fmt: skip
    """y [..., N] of x [..., K]. Raises Unsupported. `to_fp8` runs the linears whose results are bytes."""
    M, N, y = _output(x, codes[-1])
    if M == 0:
        return y
    steps = [
        (W.contiguous(), scale.contiguous(), None if b is None else b.contiguous())
        for W, scale, b in zip(codes, scales, biases, strict=True)
    ]
    with torch.cuda.device_of(x):
        rows = rows_fp8(x, steps[:-1], reaches, acts, norm, eps, to_fp8)
        byte_linear.to_floats(rows, *steps[-1], _added(residual, M, N), acts[-1], y.view(M, N))
    return y


def rows_fp8(
    x: Tensor, steps: Sequence[tuple[Tensor, Tensor, Tensor | None]], reaches: Sequence[Tensor], acts: Sequence[str],
    norm: Sequence[Tensor] = (), eps: float = 0.0, to_fp8: Callable[..., Rows] = byte_linear.to_fp8,
) -> Rows:  # fmt: skip
    """The rows of x [..., K] in bytes, after linears (codes, scale, bias), all contiguous. Raises Unsupported."""
    with torch.cuda.device_of(x):
        rows = Rows(*byte_rows.fp8(x.reshape(-1, x.shape[-1]), tuple(norm) or None, eps))  # type: ignore[arg-type]
        for step, reach, act in zip(steps, reaches, acts, strict=False):
            rows = to_fp8(rows, *step, reach.contiguous(), act, x.dtype)
    return rows


def run_int8(
    x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor],
    multipliers: Sequence[Tensor], shifts: Sequence[Tensor], wide: Tensor | None, residual: Tensor | None,
    acts: Sequence[str], norm: Sequence[Tensor] = (), eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """y [..., N] of x [..., K], of linears as `signed` makes them; `wide`: of the first. Raises Unsupported."""
    M, N, y = _output(x, codes[-1])
    if M == 0:
        return y
    with torch.cuda.device_of(x):
        q = byte_rows.int8(x.reshape(M, -1), tuple(norm) or None, eps, multipliers[0], shifts[0], wide)  # type: ignore[arg-type]
        rows = Rows(q)
        for i, act in enumerate(acts[:-1]):
            steps = multipliers[i + 1].contiguous(), shifts[i + 1].contiguous()
            rows = byte_linear.to_int8(rows, codes[i], scales[i], biases[i], *steps, act, x.dtype)
        added = _added(residual, M, N)
        byte_linear.to_floats(rows, codes[-1], scales[-1], biases[-1], added, acts[-1], y.view(M, N))
    return y


def signed(codes: Tensor, scale: Tensor, bias: Tensor, wide: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and bias of a linear whose bytes lie from -128 on, with the rows that the next one reads again.

    `W (q - 128)` is less than `W q` by 128 times the row's sum, which the bias makes up for; `wide` of the next linear
    names the rows that stand a second time at the end.
    """
    sums = codes.sum(1, dtype=torch.int64).double()
    bias = (bias.double() + 128 * scale.double() * sums).float()
    if wide is not None:
        again = wide.long()
        codes, scale, bias = (torch.cat([part, part[again]]) for part in (codes, scale, bias))
    return codes.contiguous(), scale.contiguous(), bias.contiguous()


def _output(x: Tensor, last: Tensor) -> tuple[int, int, Tensor]:
    M, N = math.prod(x.shape[:-1]), len(last)
    return M, N, torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)


def _added(residual: Tensor | None, M: int, N: int) -> Tensor | None:
    if residual is None:
        return None
    rows = residual.reshape(M, N)
    return rows if rows.stride(1) == 1 else rows.contiguous()
