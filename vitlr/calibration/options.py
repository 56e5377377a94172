"""What calibration can be asked to measure; imports no torch, so that the shell reads it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitlr.errors import InputError
from vitlr.runtime.fields import Options, option
from vitlr.runtime.sizes import read_bytes

OBJECTIVES = ("fisher", "loss", "output", "normalized")
DEFAULT = OBJECTIVES[0]  # nearest to the dense model at every budget tried (docs/results/ablate.md)
GRADIENT_OBJECTIVES = ("loss", "fisher")  # both need the moments of tokens
HIDDEN = "hidden"  # the input moments of the MLPs' second linears only, which pruning needs
VALUES = "values"  # the input moments of the attentions' projections, for pruning their value channels or heads
QUERIES = "queries"  # the moments of queries and keys alone, where no MLP can get narrower; else HIDDEN brings them
ROUNDING = "rounding"  # both sides of every linear in full, which rounding its weight needs
RANGES = "ranges"  # the least and the largest input of every channel, which multiplying bytes needs
EXTRAS = ("input_moment", "input_abs", "row_gradient", HIDDEN, VALUES, QUERIES, ROUNDING, RANGES)
FEW = 100  # images below which a calibration warns
HIDDEN_MEMORY = 8e9  # bytes: with "fisher" ViT-B's moments take 1.8e9, ViT-L's 6.4e9; half of that without


@dataclass(frozen=True)
class Calibration(Options):
    """What is measured, of which layers, and by which draws."""

    objective: str | Sequence[str] = option(
        DEFAULT, "What a plan may count: fisher, loss, output or normalized.", metavar="NAME"
    )
    samples: int = option(1, "Losses drawn for each image.", low=1, metavar="N")
    seed: int = option(0, "Seed of these draws.", low=0, metavar="N")
    include: str | Sequence[str] | None = option(
        None, "Only layers whose name matches; may be repeated.", metavar="REGEX"
    )
    exclude: str | Sequence[str] | None = option(
        None, "No layers whose name matches; may be repeated.", metavar="REGEX"
    )
    extras: Sequence[str] = option((), "What else is added up, for the baselines, for rounding and for int8.", flag="")
    hidden: bool | str | None = option(
        None,
        "Moments of hidden neurons: True, False, 'attention' for its heads too, None where they can be had.",
        flag="",
    )
    hidden_memory: float = option(HIDDEN_MEMORY, "Bytes that those may take.", above=0, flag="")
    max_memory: str | float | None = option(
        None, "Refuse to measure where the sums would take more than this, as in 2GB.", metavar="SIZE"
    )

    sums_in: str | None = option(
        None,
        "Keep moments in a temporary file of this folder: slower, and hardly any memory.",
        metavar="FOLDER",
    )

    @property
    def objectives(self) -> tuple[str, ...]:
        """All objectives asked for."""
        return (self.objective,) if isinstance(self.objective, str) else tuple(self.objective or ())

    @property
    def most(self) -> float:
        """Bytes that all sums together may take."""
        return float("inf") if self.max_memory is None else read_bytes(self.max_memory, "max_memory")

    def check(self) -> None:
        """Raise `InputError` for objectives, extras and a choice of hidden moments that there are none of."""
        for name, asked, known in (("objective", self.objectives, OBJECTIVES), ("extras", self.extras, EXTRAS)):
            unknown = [value for value in asked if value not in known]
            if unknown or (name == "objective" and not asked):
                raise InputError(
                    f"unknown {name} {unknown[0] if unknown else '()'!r}, expected one of {', '.join(known)}"
                )
        if self.hidden not in (None, False, True, "attention"):
            raise InputError(f"hidden={self.hidden!r}, expected True for MLPs or 'attention' for attention too")
        if self.max_memory is not None:
            read_bytes(self.max_memory, "max_memory")
