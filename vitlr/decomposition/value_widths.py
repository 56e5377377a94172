"""What every number of value channels, or of heads, costs an attention: `mlp_widths` with proj for fc2.

The projection reads o = the heads side by side `[d]` as the second linear of an MLP reads its hidden neurons, and
channel j of o is made by row j of v alone. So with `M = Σ o oᵀ` the same elimination gives the order in which channels
go, one by one or a head at a time, the loss of every width, and the weights that make up for what is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

from torch import Tensor, nn

from vitlr.anatomy.attention import Attention, loses_heads, measurable, nothing
from vitlr.anatomy.mlps import Mlp
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.mlp_widths import RIDGE, WidthSpectrum, check_options, prepared, solved
from vitlr.errors import InputError
from vitlr.measuring import cost
from vitlr.nn.selected_linear import INDEX_BYTES

GRAINS = ("channels", "heads")


@dataclass(eq=False)
class ValueSpectrum(WidthSpectrum):
    """All widths of one attention at once; with `group` = its head dimension whole heads go.

    `loses_heads` says whether the module really has fewer heads where whole ones are gone, `macs` what it multiplies
    between its linears for one image.
    """

    attention: Attention = field(kw_only=True)
    loses_heads: bool = field(kw_only=True)
    macs: float = field(kw_only=True)
    _left: dict[int, dict[str, int]] = field(default_factory=dict, repr=False, kw_only=True)

    @property
    def kind(self) -> str:
        return "heads" if self.group > 1 else "channels"

    def keep(self, width: int) -> Tensor:
        """The channels kept at a width, ascending. Raises `InputError` for a width of no whole number of groups."""
        if width % self.group:
            raise InputError(f"{self.name}: width {width}, expected a multiple of its head dimension {self.group}")
        return super().keep(width)

    def choices(self, step: int) -> list[int]:
        return super().choices(self.group if self.group > 1 else step)

    def shape(self, name: str, full: tuple[int, int], width: int) -> tuple[int, int]:
        return (full[0], width) if name == self.second else (self._counts(width)[name], full[1])

    def rows(self, keep: Tensor) -> dict[str, Tensor]:
        return self.attention.rows(keep)

    def extra(self, width: int, quantity: str) -> float:
        if width == self.full_width:
            return 0.0
        if self.loses_heads and self.attention.whole(self.keep(width)):
            return self.macs * (width / self.full_width - 1) if quantity == "macs" else 0.0
        if quantity != "bytes":
            return 0.0
        full = len(self.order) * (3 if len(self.first) == 1 else 1)
        return INDEX_BYTES * float(width + sum(rows for rows in self._counts(width).values() if rows < full))

    def _counts(self, width: int) -> dict[str, int]:
        if width not in self._left:
            self._left[width] = {name: len(rows) for name, rows in self.rows(self.keep(width)).items()}
        return self._left[width]


def solve_values(
    model: nn.Module,
    stats: Statistics,
    grain: str,
    objective: str | None = None,
    *,
    compensate: bool = True,
    ridge: float = RIDGE,
    damping: float = 0.1,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, ValueSpectrum]:
    """The width spectra of all attentions that the statistics cover, by name, in float64; `grain` channels or heads.

    Needs the moments of `calibrate(..., hidden="attention")`; all else as in `solve_widths`. Raises `InputError` where
    the statistics hold no such moments or no attention is known, with what is supported.
    """
    if grain not in GRAINS:
        raise InputError(f"unknown attention={grain!r}, expected one of {', '.join(GRAINS)}")
    objective = objective or stats.default_objective
    check_options(objective, ridge)
    measured = _measured(model, stats)
    between = _between(model, stats, measured)
    found: dict[str, ValueSpectrum] = {}
    for name, attention in measured.items():
        module = model.get_submodule(name)
        # An attention seen as an MLP: v for its first linears, proj for its second.
        child = len(name) + 1 if name else 0
        pair = Mlp(name, module, tuple(part[child:] for part in attention.inputs), attention.output[child:])
        known = prepared(pair, stats, objective, compensate, ridge, damping)
        values = {f.name: getattr(known, f.name) for f in fields(known) if f.init}
        values["group"] = attention.head_dim if grain == "heads" else 1
        macs = between.get(name)
        spectrum = ValueSpectrum(**values, attention=attention, loses_heads=macs is not None, macs=macs or 0.0)
        found[name] = solved(spectrum)
        if progress is not None:
            progress(len(found), len(measured))
    return found


def _measured(model: nn.Module, stats: Statistics) -> dict[str, Attention]:
    """The attentions whose linears are all dense and measured."""
    found, refused = measurable(model, stats.layers)
    if not found:
        raise InputError(nothing(model, refused))
    for name, attention in found.items():
        if stats.layers[attention.output].input_moment is None:
            raise InputError(
                f"these statistics hold no moments of value channels ({name}); calibrate with hidden='attention', "
                "which pruning attention needs"
            )
    return found


def _between(model: nn.Module, stats: Statistics, measured: Mapping[str, Attention]) -> dict[str, float]:
    """MACs of one image between the linears of those attentions that can have fewer heads."""
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
