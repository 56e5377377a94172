"""What can be said of the images a model takes; imports no torch, so that the shell reads it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vitlr.errors import InputError
from vitlr.runtime.fields import Options, option


@dataclass(frozen=True)
class Preprocessing(Options):
    """What takes the place of the model's own description of its images; None leaves that as it is."""

    mean: str | Sequence[float] | None = option(
        None, "Mean of the pixels, from 0 to 1: one number, or one a channel.", metavar="N,N,N"
    )
    std: str | Sequence[float] | None = option(
        None, "Their standard deviation: one number, or one a channel.", metavar="N,N,N"
    )
    img_size: int | None = option(None, "Pixels of a side of the image.", low=1, flag="", metavar="N")
    crop_pct: float | None = option(None, "Share of the scaled image that is cut out.", above=0, high=1, metavar="N")
    interpolation: str | None = option(
        None, "How images are scaled.", among=("nearest", "bilinear", "bicubic", "lanczos"), metavar="NAME"
    )

    def check(self) -> None:
        """Raise `InputError` for means and deviations that are no numbers in range."""
        for key, low in (("mean", None), ("std", 0.0)):
            values = numbers(key, getattr(self, key))
            if values is not None and low is not None and min(values) <= low:
                raise InputError(f"{key}={getattr(self, key)!r}, expected numbers above 0")

    def words(self) -> dict[str, Any]:
        """timm's words for what is said."""
        found: dict[str, Any] = {key: numbers(key, getattr(self, key)) for key in ("mean", "std")}
        found |= {"crop_pct": self.crop_pct, "interpolation": self.interpolation}
        found["input_size"] = None if self.img_size is None else (self.img_size, self.img_size)
        return {key: value for key, value in found.items() if value is not None}


def numbers(key: str, given: Any) -> tuple[float, ...] | None:
    """`0.5,0.5,0.5`, `0.5` or a sequence as numbers; `InputError` for anything else."""
    if given is None:
        return None
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, Sequence) else [given]
    try:
        values = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        values = ()
    if not values or not all(abs(value) < 1e6 for value in values):  # NaN compares false
        raise InputError(f"{key}={given!r}, expected a number or one a channel, such as 0.5,0.5,0.5")
    return values
