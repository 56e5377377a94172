"""The widths of MLPs: hidden neuron j is row j of the first linears and column j of the second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitlr.anatomy.mlps import SUPPORTED, Mlp, refused_mlps
from vitlr.anatomy.reading import Parts
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.options import Decomposition, check_objective
from vitlr.decomposition.widths import Solved, WidthSpectrum
from vitlr.errors import InputError


@dataclass(frozen=True, eq=False, kw_only=True)
class MlpSpectrum(WidthSpectrum):
    """All widths of one MLP at once. In a `packed` one neuron j is rows j and D + j of its single first linear.

    `beside` is what a neuron takes outside the linears: parameters, MACs of an image and bytes.
    """

    packed: bool
    beside: Mapping[str, float]

    def shape(self, name: str, full: tuple[int, int], width: int) -> tuple[int, int]:
        """(N, K) of one of its linears at a width; `full` is what it has now."""
        return (full[0], width) if name == self.second else (width * (2 if self.packed else 1), full[1])

    def rows(self, keep: Tensor) -> dict[str, Tensor]:
        """The rows of every first linear that stay with the neurons `keep`."""
        rows = torch.cat([keep, keep + self.full_width]) if self.packed else keep
        return dict.fromkeys(self.first, rows)

    def extra(self, width: int, quantity: str) -> float:
        """What a width costs besides its linears' weights and biases: layers between lose what its neurons took."""
        return (width - self.full_width) * self.beside.get(quantity, 0.0)


def solve_mlp(
    mlp: Mlp,
    stats: Statistics,
    objective: Objective,
    options: Decomposition,
    step: int = 0,
    known: Solved | None = None,
) -> MlpSpectrum:
    """All widths of one of `measured_mlps`. Raises `NumericalError` naming it."""
    *first, second = mlp.linears
    return MlpSpectrum.solved(
        mlp.name,
        "mlp",
        tuple(first),
        mlp.fc2,
        stats.layers[second],
        objective,
        options,
        step=step,
        known=known,
        packed=mlp.packed,
        beside=_beside(mlp, stats),
    )


def _beside(mlp: Mlp, stats: Statistics) -> dict[str, float]:
    """What a neuron of an MLP takes outside the linears."""
    found = {"params": 0.0, "macs": 0.0, "bytes": 0.0}
    tokens = stats.layers[mlp.linears[-1]].tokens / max(stats.images, 1)
    for layer in mlp.layers:
        held = [(key, value[0]) for key, value in layer.state_dict().items() if value.ndim]
        found["params"] += sum(value.numel() for key, value in held if key in layer._parameters)
        found["bytes"] += sum(value.numel() * value.element_size() for _, value in held)
        found["macs"] += layer.weight[0].numel() * tokens if isinstance(layer, nn.Conv2d) else 0.0
    return found


def measured_mlps(parts: Parts, stats: Statistics, objective: Objective) -> Mapping[str, Mlp]:
    """The MLPs whose linears are all dense and measured; `InputError` with the reason where there are none.

    Where the second one has more outputs than inputs (an MLP made narrower than the embedding before), gradients were
    measured at its inputs, `H = Wᵀ S W` without S: it keeps its width.
    """
    check_objective(objective.name, centred=objective.centred, widths=True)
    if why := why_no_widths(parts, stats, objective):
        raise InputError(why if parts.mlps_among(stats.layers) else f"{why}. Supported: {SUPPORTED}")
    growing = _growing(parts, stats, objective)
    measured = {name: mlp for name, mlp in parts.mlps_among(stats.layers).items() if name not in growing}
    for name, mlp in measured.items():
        if stats.layers[mlp.linears[-1]].input_moment is None:
            raise InputError(
                f"these statistics hold no hidden moments ({name}); calibrate with hidden=True, which widths need"
            )
    return measured


def why_no_widths(parts: Parts, stats: Statistics, objective: Objective) -> str:
    """Why none of the measured MLPs can get narrower, whatever else was measured; "" where one can."""
    measured = parts.mlps_among(stats.layers)
    if not measured:
        if parts.mlps:
            return f"none of the {len(parts.mlps)} MLPs recognised was measured"
        none = f"{type(parts.model).__qualname__} has no MLP of a form that is known"
        return next(iter(refused_mlps(parts.model).values()), none).partition(". Supported: ")[0]
    if (growing := _growing(parts, stats, objective)) == set(measured):
        return (
            f"the second linear of {min(growing)} has more outputs than inputs, as have all others: "
            "their widths need objective='output'"
        )
    return ""


def _growing(parts: Parts, stats: Statistics, objective: Objective) -> set[str]:
    """The measured MLPs whose second linear has gradients at its inputs only."""
    if not objective.by_gradient:
        return set()
    measured = parts.mlps_among(stats.layers).items()
    return {name for name, mlp in measured if stats.layers[mlp.linears[-1]].side == "input"}
