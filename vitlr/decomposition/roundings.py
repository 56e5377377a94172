"""Rounding a linear's weight: what every level costs in bytes and in nats before anything is rounded, and the codes.

With `S ≈ (1 + L_O) D_O (1 + L_O)ᵀ` of the output's gradients and C of the inputs likewise, both damped, errors in steps
`2^(level/8) / √(D_O,i D_I,j)` cost the same at every entry: `4^(level/8) / 12` nats. So at one level for the whole
network nothing is gained by moving bits from one weight to another (reverse water-filling), and the codes, whose
spread differs from weight to weight, are stored by their frequency (docs/method.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vitlr.decomposition.sides import PRICED, Sides
from vitlr.nn.quantized_linear import LARGEST, QuantizedLinear, step
from vitlr.ops.linalg.rounding import round_to_steps
from vitlr.runtime import compact
from vitlr.runtime.coding import size

LADDER = 2  # eighths of a power of two from one level to the next: a quarter of a bit
_SPREADS = (0.3, 30.0)  # of the codes, from the coarsest level to the finest
_PEAK = 0.9  # of the largest code that a weight may be: what later errors ask of it comes on top
_SAMPLE = 2**16  # codes of a layer that its bytes are estimated from


Ladder = dict[int, tuple[float, float]]  # bytes and nats of every level, the finest first


@dataclass(frozen=True, eq=False)
class Rounding:
    """One linear `W [N, K]` at all levels; the sides of its loss are made from the sums when asked for."""

    name: str
    sides: Sides = field(repr=False)
    weight: Tensor = field(repr=False)
    D: tuple[Tensor, Tensor] = field(repr=False)
    """D_O `[N]` and D_I `[K]`, as the layer has its rows and columns."""
    spread: tuple[Tensor, Tensor] = field(repr=False)
    """What making up for errors multiplies the variances of the rounding errors by, `[N]` and `[K]`."""
    price: tuple[Tensor, Tensor] = field(repr=False)
    """What such an error counts in nats, where D counts it in the metric that is rounded by, `[N]` and `[K]`."""

    @classmethod
    def of(cls, name: str, sides: Sides, weight: Tensor) -> Rounding:
        """Of a linear with these sides. Raises `NumericalError` naming the layer for moments that are none."""
        found = zip(sides.factored(), sides.moments(PRICED), strict=True)
        (D_O, s_O, p_O), (D_I, s_I, p_I) = (side.by_entry(M) for side, M in found)
        return cls(name, sides, weight.detach().cpu(), (D_O, D_I), (s_O, s_I), (p_O, p_I))

    def among(self, rows: Tensor | None, columns: Tensor | None, weight: Tensor) -> Rounding:
        """The same layer with these outputs and inputs alone, and `weight` for what is left of it."""
        return Rounding.of(self.name, self.sides.among(rows, columns), weight)

    @property
    def levels(self) -> list[int]:
        """Multiples of the ladder's step from which codes fit into 8 bits to where most of them vanish."""
        rms = (self.weight.double().square() * self.D[0][:, None] * self.D[1]).mean().sqrt().clamp_min(1e-30)
        fine, coarse = (8 * torch.log2(rms / spread).item() for spread in reversed(_SPREADS))
        return list(range(LADDER * round(fine / LADDER), LADDER * round(coarse / LADDER) + 1, LADDER))

    def exponents(self, level: int) -> tuple[Tensor, Tensor]:
        """Those of the rows and columns, in eighths of a power of two; coarser where a column's codes would not fit."""
        rows, columns = (-4 * D.log2() for D in self.D)
        rows, columns = (rows + level).round().to(torch.int16), columns.round().to(torch.int16)
        peak = (self.weight.double().abs() / step(rows, columns)).amax(0) / (_PEAK * LARGEST)
        return rows, columns + (8 * peak.clamp_min(1).log2()).ceil().to(torch.int16)

    @cached_property
    def ladder(self) -> Ladder:
        """Bytes and nats of every level, the finest first."""
        return {level: self.costs(level) for level in self.levels}

    def costs(self, level: int) -> tuple[float, float]:
        """Bytes of the file and predicted nats at a level: those of rounding plainly what rounding in turn will round.

        That is the weight and what the errors of later entries ask of it, of variance
        `step² / 12 · (spread_i spread_j − 1)`, drawn here; the error of entry (i, j) then counts `price_O,i price_I,j`.
        """
        N, K = self.weight.shape
        rows, columns = self.exponents(level)
        some = slice(None, None, -(-N * K // _SAMPLE))  # of the columns
        steps = step(rows, columns[some])
        asked = (torch.outer(self.spread[0], self.spread[1][some]) - 1).clamp_min(0).div(12).sqrt().float()
        noise = torch.randn(steps.shape, generator=torch.Generator().manual_seed(0))
        wanted = self.weight[:, some].float() / steps + asked * noise
        codes = wanted.round().clamp(-LARGEST, LARGEST)
        error = (codes - wanted).square_().mul_(steps.square())
        loss = float(self.price[0] @ error.double() @ self.price[1][some])
        uniform = self.price[1] * torch.exp2(columns.double() / 4)  # what columns lose, up to one factor: few lose most
        loss *= float(uniform.sum() / uniform[some].sum())
        share = K / steps.shape[1]
        overhead = sum(part.nbytes for e in (rows, columns) for part in compact.stored(e).values())
        return share * size(codes.to(torch.int8)) + overhead, loss

    def rounded(self, level: int, weight: Tensor, bias: Tensor | None) -> QuantizedLinear:
        """The layer of integers at a level, its bias moved by what the inputs' mean makes of the error."""
        rows, columns = self.exponents(level)
        W, steps = weight.detach().cpu().double(), step(rows, columns).double()
        codes, _ = round_to_steps(W, steps, *self.sides.factored(), LARGEST)
        if bias is not None:
            bias = (bias.detach().double().cpu() + (W - codes * steps) @ self.sides.mean()).to(bias.dtype)
        low = QuantizedLinear.from_codes(codes.to(torch.int8), rows, columns, bias)
        return low.to(weight.device)
