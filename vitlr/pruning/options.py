"""What learnt pruning can be asked for; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vitlr.calibration.options import DEFAULT, OBJECTIVES
from vitlr.errors import InputError
from vitlr.runtime.fields import Options, option

KINDS = ("qkv", "proj", "fc1", "fc2")
ATTENTION, FEED_FORWARD = KINDS[:2], KINDS[2:]
THRESHOLDS = ("global", "type", "params")


@dataclass(frozen=True)
class Gating(Options):
    """Which gates there are, how they are trained, and how those that go are chosen."""

    thresholds: str = option(
        "global", "Compare gates over all (global), by type, or per saved params.", among=THRESHOLDS, metavar="NAME"
    )
    kinds: str | Iterable[str] | None = option(
        KINDS, "Some of qkv,proj,fc1,fc2. [default: all, with --hybrid fc1,fc2]", flag="--gates", metavar="KINDS"
    )
    l1: float = option(
        1e-4, "Weight of the gates' l1 norm in the loss.", low=0, metavar="X"
    )  # that of arXiv 2104.08500
    tile: int = option(16, "Widths are multiples of N, 1 as published.", low=1, metavar="N")  # ragged ones run slower
    floor: int = option(1, "Channels that stay at least.", low=1, metavar="N")
    fold: bool = option(True, "Multiply kept gates into the weights; without, they become 1, as published.", flag="")

    @property
    def gated(self) -> tuple[str, ...]:
        """The kinds in their order; () for no gates at all."""
        return () if self.kinds is None else parse_kinds(self.kinds)

    def check(self) -> None:
        """Raise `InputError` for gates that there are none of."""
        parse_kinds(() if self.kinds is None else self.kinds)


@dataclass(frozen=True)
class Blending(Gating):
    """The same beside low-rank attention; `kinds=None` has no gates, and everything becomes low rank."""

    kinds: str | Iterable[str] | None = option(
        FEED_FORWARD, "Some of fc1,fc2, or none.", flag="--gates", metavar="KINDS"
    )
    share: float = option(0.5, "What attention keeps of its weights.", above=0, below=1, metavar="S")
    uniform: bool = option(True, "Ranks by one budget over all layers, not the same share each.", flag="--allocated")
    rank_step: int = option(16, "Ranks are multiples of N.", low=1, metavar="N")
    objective: str = option(DEFAULT, "What the ranks count.", among=OBJECTIVES, flag="")

    def check(self) -> None:
        """As without low rank, but for gates that may be left out."""
        if self.kinds is not None:
            super().check()


def parse_kinds(kinds: str | Iterable[str]) -> tuple[str, ...]:
    """The kinds in their order; `InputError` for none or one that is unknown."""
    asked = tuple(kinds.replace(",", " ").split()) if isinstance(kinds, str) else tuple(kinds)
    unknown = [kind for kind in asked if kind not in KINDS]
    if unknown or not asked:
        raise InputError(f"unknown gates {unknown[0]!r}" if unknown else f"no gates; choose some of {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in asked)
