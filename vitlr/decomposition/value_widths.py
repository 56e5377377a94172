"""What every number of value channels, or of heads, costs an attention: `widths` with the projection for fc2.

The projection reads o = the heads side by side `[d]` as the second linear of an MLP reads its hidden neurons, and
channel j of o is made by row j of v alone. So with `M = Σ o oᵀ` the same elimination gives the order in which channels
go, one by one or a head at a time, the loss of every width, and the weights that make up for what is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitlr.anatomy.attention import Attention, loses_heads, measurable, nothing
from vitlr.anatomy.reading import Parts
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.options import Decomposition, check_objective
from vitlr.decomposition.widths import Solved, WidthSpectrum
from vitlr.errors import InputError
from vitlr.measuring import cost
from vitlr.nn.selected_linear import INDEX_BYTES


@dataclass(frozen=True, eq=False, kw_only=True)
class ValueSpectrum(WidthSpectrum):
    """All widths of one attention at once, in channels, or with `group` = its head dimension in whole heads.

    `loses_heads` says whether the module really has fewer heads where whole ones are gone, `macs` what it multiplies
    between its linears for one image.
    """

    attention: Attention
    loses_heads: bool
    macs: float
    _left: dict[int, dict[str, int]] = field(default_factory=dict, repr=False)

    def keep(self, width: int) -> Tensor:
        """The channels kept at a width, ascending. Raises `InputError` for a width of no whole number of groups."""
        if width % self.group:
            raise InputError(f"{self.name}: width {width}, expected a multiple of its head dimension {self.group}")
        return super().keep(width)

    def choices(self, step: int) -> list[int]:
        """Widths of whole groups below the full one, and that."""
        return super().choices(self.group if self.group > 1 else step)

    def shape(self, name: str, full: tuple[int, int], width: int) -> tuple[int, int]:
        """(N, K) of one of its linears at a width; `full` is what it has now."""
        return (full[0], width) if name == self.second else (self._counts(width)[name], full[1])

    def rows(self, keep: Tensor) -> dict[str, Tensor]:
        """The rows of every first linear that stay with the channels `keep`."""
        return self.attention.rows(keep)

    def extra(self, width: int, quantity: str) -> float:
        """What a width costs besides its linears' weights and biases: fewer heads save, numbers of rows take bytes."""
        if width == self.full_width:
            return 0.0
        if self.loses_heads and self.attention.whole(self.keep(width)):
            return self.macs * (width / self.full_width - 1) if quantity == "macs" else 0.0
        if quantity != "bytes":
            return 0.0
        full = {name: len(rows) for name, rows in self.rows(torch.arange(self.full_width)).items()}
        return INDEX_BYTES * float(width + sum(rows for name, rows in self._counts(width).items() if rows < full[name]))

    def _counts(self, width: int) -> dict[str, int]:
        if width not in self._left:
            self._left[width] = {name: len(rows) for name, rows in self.rows(self.keep(width)).items()}
        return self._left[width]


def solve_values(
    attention: Attention,
    parts: Parts,
    stats: Statistics,
    objective: Objective,
    grain: str,
    macs: float | None,
    options: Decomposition,
    step: int = 0,
    known: Solved | None = None,
) -> ValueSpectrum:
    """All widths of one of `measured_values`, with what `macs_between` says of it. `NumericalError` naming it."""
    return ValueSpectrum.solved(
        attention.name,
        grain,
        attention.inputs,
        parts.linears[attention.output],
        stats.layers[attention.output],
        objective,
        options,
        step=step,
        known=known,
        group=attention.head_dim if grain == "heads" else 1,
        attention=attention,
        loses_heads=macs is not None,
        macs=macs or 0.0,
    )


def measured_values(parts: Parts, stats: Statistics, objective: Objective) -> dict[str, Attention]:
    """The attentions whose linears are all dense and measured; `InputError` with the reason where there are none."""
    check_objective(objective.name, centred=objective.centred, widths=True)
    found = {name: a for name, a in parts.attentions.items() if all(linear in stats.layers for linear in a.linears)}
    if not found:
        raise InputError(nothing(parts.model, measurable(parts.model, stats.layers)[1]))
    for name, attention in found.items():
        if stats.layers[attention.output].input_moment is None:
            raise InputError(
                f"these statistics hold no moments of value channels ({name}); calibrate with hidden='attention', "
                "which narrower values need"
            )
    return found


def macs_between(parts: Parts, stats: Statistics, measured: Mapping[str, Attention]) -> dict[str, float]:
    """MACs of one image between the linears of those attentions that can have fewer heads."""
    model = parts.model
    wanted = {name: a for name, a in measured.items() if loses_heads(model.get_submodule(name))}
    if not wanted:
        return {}
    whole = cost.count_macs_of(model, cost.example_input(model, stats.input_shape), wanted)
    layers = stats.layers
    linears = {
        name: sum(layers[n].in_features * layers[n].out_features * layers[n].tokens for n in attention.linears)
        for name, attention in wanted.items()
    }
    return {name: whole[name] - linears[name] / max(stats.images, 1) for name in wanted}
