"""What refinement did, rung by rung: printed as a table, kept in the model's file, and on the way in snapshots."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from vitlr.refinement.judge import Distance
from vitlr.refinement.recipe import RENAMED, WORDS
from vitlr.runtime import snapshots
from vitlr.runtime.kinds import FLAG, NAME, NONE, number, text, whole
from vitlr.runtime.snapshots import check_like, restore, stored


@dataclass(frozen=True)
class Rung:
    """One rung: the distance to the dense model on held-out images before and after, what it took, whether it stayed.

    `after` is what the rung reached, also where it was not kept and the model is the one from `before`.
    """

    name: str
    kept: bool
    before: Distance
    after: Distance
    images: int
    steps: int
    seconds: float
    note: str = ""

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Rung:
        ends = {key: _distance(body[key]) for key in ("before", "after")}
        return cls(**{**body, **ends, "name": WORDS.get(body["name"], body["name"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a distance without end, of answers that were NaN, is null."""
        body = asdict(self)
        for key in ("before", "after"):
            if not math.isfinite(body[key]["kl"]):
                body[key]["kl"] = None
        return body

    def __str__(self) -> str:
        verdict = "kept" if self.kept else "not kept"
        note = f"; {self.note}" if self.note else ""
        return (
            f"{self.name}: {self.before} -> {self.after}, {verdict} "
            f"({self.images} images, {self.steps} steps, {self.seconds:.1f} s{note})"
        )


@dataclass(frozen=True)
class Refinement:
    """The whole ladder: images learnt from and held out, the seed, and every rung that ran."""

    images: int
    held_out: int
    seed: int
    rungs: tuple[Rung, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {**asdict(self), "rungs": [rung.to_dict() for rung in self.rungs]}

    def __str__(self) -> str:
        head = f"refined on {self.images} images, judged on {self.held_out} held-out ones"
        return "\n".join([head, *(textwrap.fill(f"  {rung}", 80, subsequent_indent="    ") for rung in self.rungs)])


def _distance(body: dict[str, Any]) -> Distance:
    return Distance(math.inf if body["kl"] is None else body["kl"], body["agreement"])


DISTANCE = {"kl": number() | NONE, "agreement": number(0, 100) | NONE}
RUNG = {
    "name": NAME,
    "kept": FLAG,
    "before": DISTANCE,
    "after": DISTANCE,
    "images": whole(0),
    "steps": whole(0),
    "seconds": number(0),
    "note?": text(2000),
}


class Snapshots(snapshots.Snapshots):
    """What a refinement has reached; see `runtime.snapshots`: finished rungs, and the state of the one that distils."""

    kind = "refinement"
    words: Mapping[str, str] = {**WORDS, **RENAMED}

    def save_rung(self, rung: Rung, model: nn.Module) -> None:
        """Keep the model as it left a rung, and drop what that rung kept on the way."""
        if self.folder is not None:
            self.save(f"after_{rung.name}", stored(model), rung.to_dict())
            self._path(rung.name).unlink(missing_ok=True)

    def load_rung(self, name: str, model: nn.Module) -> Rung | None:
        """Put the model where a finished rung had left it; None where that rung has not finished."""
        found = self.load(f"after_{name}", RUNG)
        if found is None:
            return None
        tensors, state = found
        check_like(tensors, model, f"{self.found(f'after_{name}')} is damaged, remove it")
        restore(model, tensors)
        return Rung.from_dict(state)
