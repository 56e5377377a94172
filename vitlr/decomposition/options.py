"""How spectra are solved, as options; imports no torch, so that the shell reads it at once."""

from __future__ import annotations

from dataclasses import dataclass

from vitlr.calibration.options import OBJECTIVES
from vitlr.errors import InputError
from vitlr.runtime.fields import Options, option

RIDGE = 1e-3  # relative to the mean variance of a hidden neuron; chosen on held-out calibration images (docs/method.md)
GRAINS = ("channels", "heads")  # in which an attention's values go: one by one, or a head at a time


@dataclass(frozen=True)
class Decomposition(Options):
    """What is solved: an objective, and how what is removed is made up for."""

    objective: str | None = option(
        None,
        "fisher, loss, output or normalized. [default: the first that was measured]",
        among=OBJECTIVES,
        metavar="NAME",
    )
    centred: bool | None = option(None, "Project deviations from the mean only.")
    damping: float | None = option(
        None, "Floor of the output gradients' moment, relative to its mean. [default: 0.1]", low=0, flag="", metavar="X"
    )
    compensate: bool = option(True, "Fold what is removed into what stays.", flag="")
    ridge: float = option(
        RIDGE, "Ridge of that regression, relative to a neuron's mean variance.", above=0, flag="", metavar="X"
    )

    def check(self) -> None:
        check_objective(self.objective, centred=bool(self.centred))


def check_objective(objective: str | None, *, centred: bool = False, widths: bool = False) -> None:
    """Raise `InputError` for an objective that centring, or narrowing, cannot have."""
    if centred and objective in ("normalized", "fisher"):
        raise InputError(
            f"centred=True needs plain moments, objective {objective!r} has one per image; use 'loss' or 'output'"
        )
    if widths and objective == "normalized":  # its unit is another one than that of the hidden moments
        raise InputError("objective='normalized' weighs whole images, hidden moments are of tokens; use 'loss'")
    if widths and (centred or objective not in (None, *OBJECTIVES)):
        what = f"objective {objective!r}" if objective not in (None, *OBJECTIVES) else "centred=True"
        raise InputError(f"{what} is of ranks alone, narrower layers have no such spectra")
