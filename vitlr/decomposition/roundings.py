"""Rounding a linear's weight: what every level costs in bytes and in nats before anything is rounded, and the codes.

With `S ≈ (1 + L_O) D_O (1 + L_O)ᵀ` of the output's gradients and C of the inputs likewise, both damped, errors in steps
`2^(level/8) / √(D_O,i D_I,j)` cost the same at every entry: `4^(level/8) / 12` nats. So at one level for the whole
network nothing is gained by moving bits from one weight to another (reverse water-filling), and the codes, whose
spread differs from weight to weight, are stored by their frequency (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vitlr.anatomy.reading import Parts
from vitlr.calibration.statistics import LayerStatistics, Statistics
from vitlr.decomposition.objectives import Objective
from vitlr.errors import InputError, NumericalError
from vitlr.nn.quantized_linear import LARGEST, QuantizedLinear, step
from vitlr.ops.linalg.rounding import Side, round_to_steps
from vitlr.ops.linalg.threads import in_threads
from vitlr.runtime import compact
from vitlr.runtime.coding import size

DAMPING = 0.5  # of both sides, of their mean: the same bytes lose least from 0.4 to 1 (docs/method.md)
LADDER = 2  # eighths of a power of two from one level to the next: a quarter of a bit
_SPREADS = (0.3, 30.0)  # of the codes, from the coarsest level to the finest
_PEAK = 0.9  # of the largest code that a weight may be: what later errors ask of it comes on top
_NOTHING = 1e-12  # of every direction where none was seen
_SAMPLE = 2**16  # codes of a layer that its bytes are estimated from


@dataclass(frozen=True, eq=False)
class Rounding:
    """One linear `W [N, K]` at all levels; the sides of its loss are made from the sums when asked for."""

    name: str
    layer: LayerStatistics = field(repr=False)
    objective: Objective
    weight: Tensor = field(repr=False)
    has_bias: bool
    D: tuple[Tensor, Tensor] = field(repr=False)
    """D_O `[N]` and D_I `[K]`, as the layer has its rows and columns."""
    spread: tuple[Tensor, Tensor] = field(repr=False)
    """What making up for errors multiplies the variances of the rounding errors by, `[N]` and `[K]`."""

    @classmethod
    def of(cls, name: str, parts: Parts, stats: Statistics, objective: Objective) -> Rounding:
        """Of one of `measured`. Raises `NumericalError` naming the layer for moments that are none."""
        layer, linear = stats.layers[name], parts.linears[name]
        own = (name, layer, objective, linear.weight.detach().cpu(), linear.bias is not None)
        (D_O, s_O), (D_I, s_I) = (side.by_entry() for side in _sides(layer, objective, own[-1]))
        return cls(*own, (D_O, D_I), (s_O, s_I))

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
    def ladder(self) -> dict[int, tuple[float, float]]:
        """Bytes and nats of every level, the finest first."""
        return {level: self.costs(level) for level in self.levels}

    def costs(self, level: int) -> tuple[float, float]:
        """Bytes of the file and predicted nats at a level: those of rounding plainly what rounding in turn will round.

        That is the weight and what the errors of later entries ask of it, of variance
        `step² / 12 · (spread_i spread_j − 1)`, drawn here; the error of entry (i, j) then counts `D_O,i D_I,j`.
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
        loss = float(self.D[0] @ error.double() @ self.D[1][some])
        uniform = self.D[1] * torch.exp2(columns.double() / 4)  # what columns lose, up to one factor: few lose most
        loss *= float(uniform.sum() / uniform[some].sum())
        share = K / steps.shape[1]
        overhead = sum(part.nbytes for e in (rows, columns) for part in compact.stored(e).values())
        return share * size(codes.to(torch.int8)) + overhead, loss

    def rounded(self, level: int, weight: Tensor, bias: Tensor | None) -> QuantizedLinear:
        """The layer of integers at a level, its bias moved by what the inputs' mean makes of the error."""
        rows, columns = self.exponents(level)
        outputs, inputs = _sides(self.layer, self.objective, self.has_bias)
        W, steps = weight.detach().cpu().double(), step(rows, columns).double()
        codes, _ = round_to_steps(W, steps, outputs, inputs, LARGEST)
        if bias is not None:
            mean = self.layer.sum("input_sum").cpu().double() / max(self.layer.tokens, 1)
            bias = (bias.detach().double().cpu() + (W - codes * steps) @ mean).to(bias.dtype)
        low = QuantizedLinear.from_codes(codes.to(torch.int8), rows, columns, bias)
        return low.to(weight.device)


def measured_linears(stats: Statistics, objective: Objective) -> list[str]:
    """The linears that can be rounded; `InputError` where the statistics do not hold what that needs."""
    if objective.name == "normalized":
        raise InputError("objective='normalized' weighs whole images, rounding needs 'loss', 'fisher' or 'output'")
    for layer in stats.layers.values():
        needed = {"input": "moment", "output": "input_moment"}[layer.side]
        gradient = {"input": "output_gradient", "output": "gradient"}[layer.side]
        if needed not in layer.held or (objective.by_gradient and gradient not in layer.held):
            raise InputError(
                f"these statistics hold no moments to round by ({layer.name}); calibrate with extras=('rounding',)"
            )
    return list(stats.layers)


def solve_roundings(names: list[str], parts: Parts, stats: Statistics, objective: Objective) -> Iterator[Rounding]:
    """All levels of these linears, a thread a layer. Raises what `Rounding.of` raises."""

    def solved(name: str) -> Rounding:
        rounding = Rounding.of(name, parts, stats, objective)
        assert rounding.ladder  # made here, where layers go side by side
        return rounding

    threads = torch.get_num_threads()
    for start in range(0, len(names), threads):
        yield from in_threads(solved, names[start : start + threads])


def _sides(layer: LayerStatistics, objective: Objective, has_bias: bool) -> Iterator[Side]:
    """Of the outputs, then of the inputs: about their mean where a bias carries it."""
    S = torch.eye(layer.out_features, dtype=torch.float64)
    if objective.by_gradient:
        sums = layer.sum("gradient" if layer.side == "output" else "output_gradient")
        S = objective.of_gradients(sums.double(), None, layer.tokens)
    C = layer.sum("input_moment" if layer.side == "output" else "moment").double()
    if has_bias:
        total = layer.sum("input_sum").double()
        C = C - torch.outer(total, total) / max(layer.tokens, 1)
    for what, M in (("outputs' gradients", S), ("inputs", objective.of_activations(C))):
        try:
            yield Side.of(M if M.any() else _NOTHING * torch.eye(len(M)), DAMPING)
        except NumericalError as cause:
            raise NumericalError(
                f"layer {layer.name}, moment of the {what}: {cause}; calibrate again in float32"
            ) from cause
