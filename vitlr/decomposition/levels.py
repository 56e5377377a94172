"""What one linear may be rounded to: as it is and at every width of its MLP, each at every level.

Bytes and nats are estimated at a few widths, and in between by what one weight costs at a level: that hardly depends on
how many others there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vitlr.anatomy.reading import Parts
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.mlp_widths import MlpSpectrum
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.roundings import Ladder, Rounding
from vitlr.decomposition.sides import Sides
from vitlr.decomposition.spectra import Levels
from vitlr.errors import InputError
from vitlr.nn.quantized_linear import QuantizedLinear
from vitlr.ops.linalg.threads import in_threads

SHARES = (0.15, 0.35, 0.6, 0.8, 1.0)  # of the full width at which levels are estimated


@dataclass(frozen=True, eq=False)
class LinearLevels:
    """One linear at all levels, and at those of every width where its MLP may get narrower."""

    whole: Rounding
    narrowing: MlpSpectrum | None = None
    at_widths: Mapping[int, Ladder] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, whole: Rounding, narrowing: MlpSpectrum | None) -> LinearLevels:
        """Estimated at some of its widths. Raises `NumericalError` naming the layer."""
        if narrowing is None:
            return cls(whole)
        at, full = {narrowing.full_width: whole.ladder}, narrowing.full_width
        for width in sorted({max(1, round(share * full)) for share in SHARES} - {full}):
            weight = narrowing.weights(width)[0] if whole.name == narrowing.second else None
            narrower = _narrower(whole, narrowing, width, weight)
            at[width] = {level: narrower.costs(level) for level in whole.levels}
        return cls(whole, narrowing, at)

    @property
    def name(self) -> str:
        """Of the linear."""
        return self.whole.name

    def ladder(self, width: int | None = None) -> Ladder:
        """Bytes and nats of every level where its MLP has this width, the finest first."""
        if width is None or width in self.at_widths or not self.at_widths:
            return self.whole.ladder if width is None or not self.at_widths else self.at_widths[width]
        widths = sorted(self.at_widths)
        costs = np.array([[*self.at_widths[w].values()] for w in widths]) / np.array(widths)[:, None, None]
        upper = min(max(int(np.searchsorted(widths, width)), 1), len(widths) - 1)
        low, high = widths[upper - 1], widths[upper]
        share = min(max((width - low) / (high - low), 0.0), 1.0)
        found = width * ((1 - share) * costs[upper - 1] + share * costs[upper])
        return {level: (float(size), float(loss)) for level, (size, loss) in zip(self.whole.levels, found, strict=True)}

    def rounded(self, level: int, weight: Tensor, bias: Tensor | None, width: int | None = None) -> QuantizedLinear:
        """The layer of integers at a level, of `weight` as it is where its MLP has this width."""
        if width is None or self.narrowing is None or width == self.narrowing.full_width:
            return self.whole.rounded(level, weight, bias)
        return _narrower(self.whole, self.narrowing, width, weight).rounded(level, weight, bias)


def _narrower(whole: Rounding, narrowing: MlpSpectrum, width: int, weight: Tensor | None) -> Rounding:
    """A linear of the MLP at a width: fewer rows of a first one, whose `weight` is then known, fewer columns of V."""
    keep = narrowing.keep(width)
    if whole.name == narrowing.second:
        assert weight is not None
        return whole.among(None, keep, weight)
    rows = narrowing.rows(keep)[whole.name]
    return whole.among(rows, None, whole.weight[rows])


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


def solve_levels(
    names: Sequence[str],
    parts: Parts,
    stats: Statistics,
    objective: Objective,
    narrowings: Mapping[str, MlpSpectrum],
    known: Mapping[str, Levels],
) -> Iterator[LinearLevels]:
    """All levels of these linears, a thread a layer, with what is `known` of them. Raises what `Rounding.of` raises."""

    def solved(name: str) -> LinearLevels:
        before = known.get(name)
        if isinstance(before, LinearLevels):
            whole = before.whole
        else:
            linear = parts.linears[name]
            whole = Rounding.of(name, Sides(stats.layers[name], objective, linear.bias is not None), linear.weight)
        assert whole.ladder  # made here, where layers go side by side
        return LinearLevels.of(whole, narrowings.get(name))

    threads = torch.get_num_threads()
    for start in range(0, len(names), threads):
        yield from in_threads(solved, names[start : start + threads])
