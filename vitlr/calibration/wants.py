"""What every layer is to collect, how many bytes that takes, and what would take fewer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from vitlr.calibration.options import HIDDEN, QUERIES, ROUNDING, VALUES
from vitlr.calibration.sums import SUMS, LayerStatistics, triangles
from vitlr.errors import InputError
from vitlr.ops.linalg.triangles import length
from vitlr.runtime.sizes import said_bytes

_ITEM = 8  # bytes of a float64


@dataclass(frozen=True)
class Wants:
    """What is asked of these layers: of all of them, and of those whose `widths` may change.

    `queries` are the heads and their size, of the layers whose first rows make those of an attention.
    """

    layers: Mapping[str, LayerStatistics]
    queries: Mapping[str, tuple[int, int]]
    device: torch.device
    objectives: tuple[str, ...]
    extras: tuple[str, ...]
    widths: frozenset[str]
    in_file: bool = False  # triangles are, and take no memory

    def of(self, name: str) -> set[str]:
        """What one layer is to collect, in the words of `SUMS`."""
        words = {*self.objectives, *(set(self.extras) - {HIDDEN, VALUES, QUERIES})}
        if name in self.widths:
            words |= {"input_moment", HIDDEN}
        if ROUNDING in self.extras and self.layers[name].side == "output":  # else `moment` is that of the inputs
            words.add("input_moment")
        return words

    @property
    def bytes(self) -> int:
        """What all sums take together in memory."""
        return sum(
            _ITEM * self._entries(key, layer.shape(key, *self.queries.get(name, ())))
            for name, layer in self.layers.items()
            for key in layer.keys(self.of(name), name in self.queries)
        )

    def _entries(self, key: str, shape: tuple[int, ...]) -> int:
        half = SUMS[key].symmetric and triangles(self.device)
        return (0 if self.in_file else length(shape[0])) if half else math.prod(shape)

    def check_fits(self, most: float) -> None:
        """Raise `InputError` where they take more than `most` bytes, with what would fit."""
        if self.bytes <= most:
            return
        fewer = {said: wants.bytes for said, wants in self._fewer().items()}
        fitting = [f"{said} ({said_bytes(taken)})" for said, taken in fewer.items() if taken <= most]
        least = f"nothing less would (at least {said_bytes(min(fewer.values()))})" if fewer else "nothing less would"
        what = f"{' or '.join(fitting)} would fit" if fitting else f"{least}; leave layers out with exclude="
        if triangles(self.device) and not self.in_file:
            what += "; sums_in= keeps them in a file"
        raise InputError(
            f"the sums of {len(self.layers)} layers take {said_bytes(self.bytes)}, more than "
            f"max_memory={said_bytes(most).replace(' ', '')}; {what}"
        )

    def _fewer(self) -> dict[str, Wants]:
        """The same without tokens of an image together, without hidden neurons, and without both."""
        plain = tuple(dict.fromkeys("loss" if name == "fisher" else name for name in self.objectives))
        ranks = replace(
            self, extras=tuple(set(self.extras) - {HIDDEN, VALUES, QUERIES}), widths=frozenset(), queries={}
        )
        found = {}
        if plain != self.objectives:
            found["objective=loss"] = replace(self, objectives=plain)
        if self.widths:
            found["hidden=False, which method=lowrank has,"] = ranks
        if len(found) == 2:
            found["both of them"] = replace(ranks, objectives=plain)
        return found
