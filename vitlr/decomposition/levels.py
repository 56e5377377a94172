"""What one linear may be rounded to, each at every level: as it is, at every width of its MLP, and as two factors.

Bytes and nats are estimated at a few widths and ranks, and in between by what one weight costs at a level: that hardly
depends on how many others there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitlr.anatomy.reading import Parts
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.factor_roundings import FactorRounding
from vitlr.decomposition.mlp_widths import MlpSpectrum
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.roundings import Ladder, Rounding
from vitlr.decomposition.sides import Sides
from vitlr.decomposition.spectra import LayerSpectrum, Levels
from vitlr.errors import InputError
from vitlr.nn import LowRankLinear, QuantizedLinear
from vitlr.ops.linalg.threads import in_threads
from vitlr.runtime import processes

Array = NDArray[np.float64]
WIDTHS, RANKS = (0.15, 0.35, 0.6, 0.8), (0.3, 0.8)  # shares of the whole, and of break-even, that are estimated
SAMPLE = 2**14  # codes that such an estimate looks at
Estimates = dict[int, Array]  # bytes and nats of a weight, [levels, 2], by width or rank


@dataclass(frozen=True, eq=False)
class LinearLevels:
    """One linear at all levels, at those of every width where its MLP may get narrower, and of its ranks."""

    whole: Rounding
    narrowing: MlpSpectrum | None = None
    spectrum: LayerSpectrum | None = None
    at_widths: Estimates = field(default_factory=dict, repr=False)
    at_ranks: Estimates = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, whole: Rounding, narrowing: MlpSpectrum | None, spectrum: LayerSpectrum | None) -> LinearLevels:
        """With estimates at some widths and some ranks, where there are any. Raises `NumericalError` naming it."""
        N, K = whole.weight.shape
        at_widths: Estimates = {}
        at_ranks: Estimates = {}
        if narrowing is not None:
            full = narrowing.full_width
            at_widths[full] = np.array([*whole.ladder.values()]) / (N * K)
            for width in _shares(WIDTHS, full):
                weight = narrowing.weights(width)[0] if whole.name == narrowing.second else None
                narrower = _narrower(whole, narrowing, width, weight)
                at_widths[width] = _costs(narrower, whole.ladder, narrower.weight.numel())
        if spectrum is not None:
            for rank in _shares(RANKS, N * K // (N + K)):
                A, B, _ = spectrum.factors(whole.weight, rank)
                factors = FactorRounding.of(whole.name, whole.sides, A, B, whole)
                at_ranks[rank] = _costs(factors, whole.ladder, rank * (N + K))
        return cls(whole, narrowing, spectrum, at_widths, at_ranks)

    @property
    def name(self) -> str:
        """Of the linear."""
        return self.whole.name

    @property
    def solution(self) -> tuple[Any, Estimates, Estimates]:
        """What it would take long to find again."""
        return self.whole.solution, self.at_widths, self.at_ranks

    def ladder(self, width: int | None = None, rank: int | None = None) -> Ladder:
        """Bytes and nats of every level where its MLP has this width, and of both factors where it has this rank."""
        narrow = width is not None and self.narrowing is not None and width < self.narrowing.full_width
        if not narrow and rank is None:
            return self.whole.ladder
        N, K = self.whole.weight.shape
        if narrow:
            N, K = self.narrowing.shape(self.name, (N, K), width)  # type: ignore[union-attr,arg-type]
        if rank is None:
            costs = N * K * _between(self.at_widths, width)  # type: ignore[arg-type]
        else:
            costs = rank * (N + K) * _between(self.at_ranks, rank)
        return {level: (float(size), float(loss)) for level, (size, loss) in zip(self.whole.ladder, costs, strict=True)}

    def rounded(
        self, level: int, linear: nn.Linear | LowRankLinear, width: int | None
    ) -> QuantizedLinear | LowRankLinear:
        """The layer of integers at a level, of a linear or its factors as they are where its MLP has this width."""
        narrow = width is not None and self.narrowing is not None and width < self.narrowing.full_width
        sides = _sides(self.whole, self.narrowing, width) if narrow else self.whole.sides  # type: ignore[arg-type]
        if isinstance(linear, LowRankLinear):
            A, B, bias = linear.up.weight, linear.down.weight, linear.up.bias
            whole = None if narrow else self.whole
            return FactorRounding.of(self.name, sides, A, B, whole).rounded(level, bias).to(A.device)
        rounding = _narrower(self.whole, self.narrowing, width, linear.weight) if narrow else self.whole  # type: ignore[arg-type]
        return rounding.rounded(level, linear.weight, linear.bias)


def _shares(shares: Iterable[float], whole: int) -> list[int]:
    return sorted({max(1, round(share * whole)) for share in shares})


def _costs(rounding: Rounding | FactorRounding, levels: Iterable[int], weights: int) -> Array:
    return np.array([rounding.costs(level, SAMPLE) for level in levels]) / weights


def _between(estimates: Estimates, size: int) -> Array:
    """Those of a width or rank, on a line between the two beside it."""
    known = sorted(estimates)
    if len(known) == 1:
        return estimates[known[0]]
    upper = min(max(int(np.searchsorted(known, size)), 1), len(known) - 1)
    low, high = known[upper - 1], known[upper]
    share = min(max((size - low) / (high - low), 0.0), 1.0)
    return (1 - share) * estimates[low] + share * estimates[high]


def _sides(whole: Rounding, narrowing: MlpSpectrum, width: int) -> Sides:
    """Those of a linear of the MLP at a width: fewer rows of a first one, fewer columns of the second."""
    keep = narrowing.keep(width)
    if whole.name == narrowing.second:
        return whole.sides.among(None, keep)
    return whole.sides.among(narrowing.rows(keep)[whole.name], None)


def _narrower(whole: Rounding, narrowing: MlpSpectrum, width: int, weight: Tensor | None) -> Rounding:
    """A linear of the MLP at a width, one side as it was; `weight` where it is not rows of the whole one."""
    sides = _sides(whole, narrowing, width)
    weight = whole.weight[sides.rows] if weight is None else weight
    if sides.rows is None:
        return Rounding.of(whole.name, sides, weight, outputs=whole.outputs)
    return Rounding.of(whole.name, sides, weight, inputs=whole.inputs)


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
    spectra: Mapping[str, LayerSpectrum],
    known: Mapping[str, Levels],
) -> Iterator[LinearLevels]:
    """All levels of these linears, and of their ranks where there are `spectra`, with what is `known`; a thread each.

    Raises what `Rounding.of` raises.
    """

    def sides(name: str) -> Sides:
        return Sides(stats.layers[name], objective, parts.linears[name].bias is not None)

    def solved(name: str) -> LinearLevels:
        before = known.get(name)
        if isinstance(before, LinearLevels):
            whole = before.whole
        else:
            whole = Rounding.of(name, sides(name), parts.linears[name].weight)
        assert whole.ladder  # made here, where layers go side by side
        return LinearLevels.of(whole, narrowings.get(name), spectra.get(name))

    def worked(own: Sequence[str]) -> Iterator[Any]:
        threads = torch.get_num_threads()
        for start in range(0, len(own), threads):
            found = in_threads(solved, own[start : start + threads])
            yield from found if processes.world() == 1 else [levels.solution for levels in found]

    for name, found in zip(names, processes.shared_out(worked, names), strict=True):
        if processes.world() == 1:
            yield found
        else:
            whole = Rounding.known(name, sides(name), parts.linears[name].weight, *found[0])
            yield LinearLevels(whole, narrowings.get(name), spectra.get(name), *found[1:])
