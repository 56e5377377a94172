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

from vitlr.decomposition.sides import Entries, Sides
from vitlr.nn.quantized_linear import BYTE, LARGEST, LARGEST_TWICE, QuantizedLinear, step
from vitlr.ops.linalg.rounding import round_to_steps
from vitlr.runtime import compact
from vitlr.runtime.coding import size
from vitlr.runtime.compact import power

LADDER = 2  # eighths of a power of two from one level to the next: a quarter of a bit
_SPREADS = (0.3, 30.0)  # of the codes, from the coarsest level to the finest
_PEAK = 0.9  # of the largest code that a weight may be: what later errors ask of it comes on top
_SIGMAS = 3  # of a row within the codes of one byte
_COARSER = 16  # eighths of a power of two that a column's steps are widened by before its codes take two bytes:
# 4^(16/8) times the loss of its entries is what 12 bits more of each are worth elsewhere
SAMPLE = 2**16  # codes of a layer that its bytes are estimated from


Ladder = dict[int, tuple[float, float]]  # bytes and nats of every level, the finest first


@dataclass(frozen=True, eq=False)
class Rounding:
    """One linear `W [N, K]` at all levels; the sides of its loss are made from the sums when asked for."""

    name: str
    sides: Sides = field(repr=False)
    weight: Tensor = field(repr=False)
    outputs: Entries = field(repr=False)
    """What errors count by row of W."""
    inputs: Entries = field(repr=False)
    """The same by column."""

    @classmethod
    def of(
        cls, name: str, sides: Sides, weight: Tensor, *, outputs: Entries | None = None, inputs: Entries | None = None
    ) -> Rounding:
        """Of a linear with these sides, of which one may be known: each takes an inverse.

        Raises `NumericalError` naming the layer for moments that are none.
        """
        return cls(name, sides, weight.detach().cpu(), outputs or sides.of_outputs(), inputs or sides.of_inputs())

    @classmethod
    def known(
        cls, name: str, sides: Sides, weight: Tensor, outputs: Entries, inputs: Entries, ladder: Ladder
    ) -> Rounding:
        """Of a `solution`."""
        rounding = cls(name, sides, weight.detach().cpu(), outputs, inputs)
        rounding.__dict__["ladder"] = ladder  # as `cached_property` keeps it
        return rounding

    @property
    def solution(self) -> tuple[Entries, Entries, Ladder]:
        """What it would take long to find again."""
        return self.outputs, self.inputs, self.ladder

    @property
    def levels(self) -> list[int]:
        """Multiples of the ladder's step from which most columns' codes fit into 8 bits to where most vanish."""
        squares = (
            self.outputs.D @ self.weight.double().square() * self.inputs.D / len(self.weight)
        )  # of a column's codes
        mean = squares.mean().clamp_min(1e-60)
        typical = squares.median() if squares.median() > 0 else mean  # else one column could keep all others from it
        ends = zip((typical, mean), reversed(_SPREADS), strict=True)
        fine, coarse = (8 * torch.log2(square.sqrt() / spread).item() for square, spread in ends)
        return list(range(LADDER * round(fine / LADDER), LADDER * round(coarse / LADDER) + 1, LADDER))

    def steps(self, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Exponents of rows and columns, in eighths of a power of two, and what codes of every column may be.

        Exponents are coarser where codes would not fit into a byte. Where a column's would have to be coarser by much,
        they stay: its codes take two bytes.
        """
        rows, columns, spread, peaks = self._finest
        finer = 2.0 ** (-level / 8)
        wider = (8 * (spread * (finer * _SIGMAS / LARGEST)).clamp_min(1).log2()).ceil().to(torch.int16)
        rows = rows + level + wider
        if wider.any():
            peaks, finer = _peaks(self.weight, rows, columns), 1.0
        peaks = peaks * (finer / (_PEAK * LARGEST))  # of every column, the largest code in what one of a byte may be
        over = (8 * peaks.clamp_min(1).log2()).ceil().to(torch.int16)
        coarser = torch.where(over > _COARSER, (over - BYTE).clamp_min(0), over)
        fits = peaks * torch.exp2(coarser / -8) <= 1 + 1e-6
        return rows, columns + coarser, torch.where(fits, LARGEST, LARGEST_TWICE)

    @cached_property
    def _finest(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """At level 0: exponents of rows and columns, how far the codes of rows spread, and the largest of columns."""
        rows, columns = ((-4 * side.D.log2()).round().to(torch.int16) for side in (self.outputs, self.inputs))
        squares = self.weight.double().square() @ power(columns).double().square().reciprocal()
        return rows, columns, (squares / len(columns)).sqrt() / power(rows), _peaks(self.weight, rows, columns)

    @cached_property
    def ladder(self) -> Ladder:
        """Bytes and nats of every level, the finest first."""
        return {level: self.costs(level) for level in self.levels}

    def costs(self, level: int, sample: int = SAMPLE) -> tuple[float, float]:
        """Bytes of the file and predicted nats at a level: those of rounding plainly what rounding in turn will round.

        That is the weight and what the errors of later entries ask of it, of variance
        `step² / 12 · (spread_i spread_j − 1)`, drawn here; the error of entry (i, j) then counts `price_O,i price_I,j`.
        """
        N, K = self.weight.shape
        rows, columns, largest = self.steps(level)
        some = slice(None, None, -(-N * K // sample))  # of the columns
        steps = step(rows, columns[some])
        asked = (torch.outer(self.outputs.spread, self.inputs.spread[some]) - 1).clamp_min(0).div(12).sqrt().float()
        noise = torch.randn(steps.shape, generator=torch.Generator().manual_seed(0))
        wanted = self.weight[:, some].float() / steps + asked * noise
        codes = wanted.round().clamp(-largest[some], largest[some])
        error = (codes - wanted).square_().mul_(steps.square())
        loss = float(self.outputs.price @ error.double() @ self.inputs.price[some])
        uniform = self.inputs.price * torch.exp2(
            columns.double() / 4
        )  # what columns lose, up to one factor: few lose most
        loss *= float(uniform.sum() / uniform[some].sum())
        share = K / steps.shape[1]
        twice = largest > LARGEST
        lower = int(twice.sum()) * (N + 4) + 600 * bool(twice.any())  # bytes; those of all values come alike often
        codes = torch.where(twice[some], (codes / 2**8).round(), codes)
        columns = torch.where(twice, columns + BYTE, columns)
        overhead = sum(part.nbytes for e in (rows, columns) for part in compact.stored(e).values())
        return share * size(codes.to(torch.int8)) + lower + overhead, loss

    def rounded(self, level: int, weight: Tensor, bias: Tensor | None) -> QuantizedLinear:
        """The layer of integers at a level, its bias moved by what the inputs' mean makes of the error."""
        rows, columns, largest = self.steps(level)
        W, steps = weight.detach().cpu().double(), step(rows, columns).double()
        codes, _ = round_to_steps(W, steps, *self.sides.factored(), largest)
        if bias is not None:
            bias = (bias.detach().double().cpu() + (W - codes * steps) @ self.sides.mean()).to(bias.dtype)
        low = QuantizedLinear.from_codes(codes, rows, columns, bias)
        return low.to(weight.device)


def _peaks(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The largest code of every column at these exponents."""
    return (weight.abs() / power(rows)[:, None]).amax(0).double() / power(columns)
