"""What a plan may choose, as options; imports no torch, so that the shell reads it at once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitlr.calibration.options import ROUNDING
from vitlr.decomposition.options import GRAINS, Decomposition, check_objective
from vitlr.errors import InputError
from vitlr.planning.budgets import Budget, is_timed
from vitlr.runtime.fields import option

METHODS = ("lowrank", "widths", "widths+ranks", "joint", "bits", "mix")
NARROWING = ("widths", "widths+ranks", "joint", "mix")
ROUNDED = ("bits", "mix")  # under a budget of bytes
ATTENTION = ("query_keys", *GRAINS, "none")  # what attention may lose
WORDS = {"prune": "widths", "hybrid": "widths+ranks", "scores": "query_keys"}  # old words: read and taken, not written
STORED = range(2, 9)  # bits of a weight in the file
WIDTH_SCALE = 1.0  # what a predicted loss of widths counts against one of ranks (docs/method.md)


@dataclass(frozen=True)
class Planning(Decomposition):
    """What is chosen under a budget, and how: ranks, widths, both, or bits; `Decomposition` says how it is solved."""

    method: str | None = option(
        None,
        "lowrank: ranks. widths: hidden widths of MLPs. widths+ranks: widths for MLPs, ranks for all else. "
        "joint: both for all. bits: weights are rounded, under a budget of bytes. mix: widths and bits in one plan. "
        "[default: joint where the model's MLPs are known and measured, else lowrank]",
        among=METHODS,
        words=WORDS,
        metavar="NAME",
    )
    uniform: bool = option(False, "Give every layer the same share.")
    ranks: Mapping[str, int] | None = option(None, "Ranks by hand, {layer: rank}; the rest stays dense.", flag="")
    rank_step: int = option(16, "Ranks are multiples of N.", low=1, metavar="N")
    min_rank: int = option(1, "The smallest rank.", low=1, metavar="N")
    rank_buckets: int | None = option(
        None, "At most N different ranks for one position in the blocks.", low=1, metavar="N"
    )
    prune_rate: float | None = option(
        None, "With widths or widths+ranks: the share of hidden neurons to remove.", above=0, below=1, metavar="X"
    )
    width_step: int = option(16, "Widths are multiples of N.", low=1, metavar="N")
    width_scale: float = option(
        WIDTH_SCALE, "What a loss of widths counts against one of ranks.", above=0, flag="", metavar="X"
    )
    corrections: Mapping[str, float] | None = option(
        None, "What predicted losses count, {MLP, attention or layer: factor}, as trials found them.", flag=""
    )
    attention: str | None = option(
        None,
        "With widths or joint, what attention may lose: query_keys (directions of queries and keys; joint does so by "
        "default), channels of its values, heads, or none.",
        among=ATTENTION,
        words=WORDS,
        flag="--prune-attention",
        metavar="WHAT",
    )
    bits: str | Sequence[int] | int | None = option(
        None,
        "Round weights to at most so many stored bits each: 2 to 8, or some of them under a budget of bytes, as in 8,4 "
        "(16: or left as they are). Without a budget all else stays; under params or macs it comes on top.",
        metavar="N",
    )
    batch_size: int | None = option(
        None, "Under a budget of latency: images in the batch that it counts for. [default: 1]", low=1, flag=""
    )
    threads: int | None = option(
        None, "Under latency: threads that it counts for. [default: those of torch]", low=1, metavar="N"
    )
    include: str | Sequence[str] | None = option(
        None, "Only layers whose name matches; may be repeated.", metavar="REGEX"
    )
    exclude: str | Sequence[str] | None = option(
        None, "No layers whose name matches; may be repeated.", metavar="REGEX"
    )

    def rounds(self, quantity: str) -> bool:
        """Whether the budget counts bytes of rounded weights."""
        return self.settled in ROUNDED or (self.bits is not None and quantity == "bytes")

    @property
    def images_a_batch(self) -> int:
        """Of the batch that a budget of latency counts for."""
        return self.batch_size or 1

    @property
    def settled(self) -> str | None:
        """The method as far as the options alone settle it: "lowrank" where they ask for what only ranks have."""
        return self.method or ("lowrank" if self.of_ranks() else None)

    @property
    def stored(self) -> tuple[int, ...]:
        """The bits that a rounded weight may be stored in, most first, 16 for what is left; empty where any may."""
        given = [] if self.bits is None else self.bits.split(",") if isinstance(self.bits, str) else self.bits
        try:
            found = [int(value) for value in ([given] if isinstance(given, int) else given)]
        except (TypeError, ValueError):
            found = [0]
        if self.bits is not None and (not found or not set(found) <= {*STORED, 16} or set(found) == {16}):
            raise InputError(
                f"bits={self.bits!r}, expected whole numbers from {STORED[0]} to {STORED[-1]}, such as 8 or (8, 4); "
                "16 among them lets a layer stay as it is"
            )
        return tuple(sorted(set(found), reverse=True))

    @property
    def hidden(self) -> bool | str:
        """What `calibrate(hidden=)` has to measure for such a plan."""
        return False if self.settled in ("lowrank", "bits") else "attention" if self.attention in GRAINS else True

    @property
    def extras(self) -> tuple[str, ...]:
        """What `calibrate(extras=)` has to measure for such a plan."""
        return (ROUNDING,) if self.settled in ROUNDED or self.bits is not None else ()

    def check(self) -> None:
        """Raise `InputError` for options that do not go together, whatever the budget."""
        super().check()
        method = self.settled
        if self.stored and self.attention not in (None, "none"):
            raise InputError(f"bits= rounds attention as it is; it does not go with attention={self.attention!r}")
        if self.stored and (self.ranks is not None or self.centred or self.objective == "normalized"):
            raise InputError("bits= goes with no ranks=, no centred=True and no objective='normalized'")
        if self.prune_rate is not None and method not in ("widths", "widths+ranks"):
            how = f", not with {self.method!r}" if self.method else "; name one of them"
            raise InputError(f"prune_rate= goes with method='widths' or 'widths+ranks'{how}")
        if self.attention not in (None, "none") and (
            method not in (None, "widths", "joint") or self.prune_rate is not None
        ):
            how = f"method={method!r}" if self.prune_rate is None else "prune_rate=, which is of hidden neurons"
            raise InputError(
                f"attention={self.attention!r} goes with a budget and method='widths' or 'joint', not with {how}"
            )
        if method in NARROWING:
            check_objective(self.objective, widths=True)
        if method in (*NARROWING, "bits"):
            for given in self.of_ranks():
                raise InputError(f"{given} goes with method='lowrank' only, not with {method!r}")
        for part, factor in (self.corrections or {}).items():
            if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
                raise InputError(f"corrections= gives {part!r} a factor of {factor!r}, expected a number above 0")
        if self.ranks is not None and (self.uniform or self.rank_buckets):
            raise InputError("ranks= names the ranks itself; it does not go with uniform= or rank_buckets=")
        if self.ranks is not None and (self.include is not None or self.exclude is not None):
            raise InputError("ranks= names the layers itself; it does not go with include= or exclude=")
        if self.uniform and self.rank_buckets:
            raise InputError("uniform=True gives one rank a shape already; it does not go with rank_buckets=")

    def check_budget(self, budget: Budget | None) -> None:
        """Raise `InputError` where these options need a budget, or leave no place for one."""
        self._check_latency(budget)
        kept = [bits for bits in self.stored if bits != 16]
        if len(self.stored) > 1 and (budget is None or budget.quantity != "bytes"):
            raise InputError(f"bits={self.bits!r} leaves a choice: give a budget of bytes, or one number from {kept}")
        if self.stored and budget is not None and budget.quantity == "bytes" and (self.uniform or self.rank_buckets):
            raise InputError(
                f"{self.of_ranks()[0]} is of ranks alone; under a budget of bytes it does not go with bits="
            )
        if self.method == "widths" and self.prune_rate is not None:
            if budget is not None:
                raise InputError("method='widths' takes a budget or a prune_rate, not both")
        elif budget is None and self.stored and self.settled in (None, "bits"):
            return
        elif budget is None and self.ranks is None:
            other = "" if self.settled not in (None, "lowrank") else ", or ranks={layer: rank}"
            raise InputError(f"give a budget such as 'params:40%'{other}")
        if self.method in ROUNDED and budget is not None and budget.quantity != "bytes":
            method = f"method={self.method!r}"
            raise InputError(f"{method} changes bytes only: give a budget such as bytes:20%, not {budget}")

    def _check_latency(self, budget: Budget | None) -> None:
        """Raise `InputError` for what only milliseconds go with, and for what they do not go with."""
        if not is_timed(budget):
            for name in ("batch_size", "threads"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name}= goes with a budget of latency, such as latency:50%")
            return
        if self.stored or self.method in ROUNDED:
            given = f"bits={self.bits!r}" if self.stored else f"method={self.method!r}"
            raise InputError(f"{given} counts stored bytes, and codes run no faster; leave it out, or give bytes:20%")
        if self.attention not in (None, "none", "query_keys"):
            raise InputError(f"attention={self.attention!r} is not timed; leave it out, or give a budget of macs")
        for given, asked in (
            ("uniform=True", self.uniform),
            ("ranks=", self.ranks is not None),
            ("rank_buckets=", self.rank_buckets),
            ("prune_rate=", self.prune_rate is not None),
        ):
            if asked:
                raise InputError(f"{given} does not go with a budget of latency, which chooses by measured times alone")

    def matching(self, names: Sequence[str]) -> set[str]:
        """The names that some `include` pattern finds (all, where none is given) and no `exclude` pattern does."""
        wanted = set(names)
        for patterns, keep in ((self.include, True), (self.exclude, False)):
            if patterns is None:
                continue
            hits: set[str] = set()
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                try:
                    found = {name for name in names if re.search(pattern, name)}
                except re.error as cause:
                    raise InputError(f"pattern {pattern!r} is no regular expression ({cause})") from cause
                if not found:
                    raise InputError(f"pattern {pattern!r} matches no layer; the first are {', '.join([*names][:3])}")
                hits |= found
            wanted = wanted & hits if keep else wanted - hits
        if not wanted:
            raise InputError("include= and exclude= together leave no layer to compress")
        return wanted

    def of_ranks(self) -> list[str]:
        """What was asked for that only ranks have."""
        asked = {
            "uniform=True": self.uniform,
            "ranks=": self.ranks is not None,
            "rank_buckets=": self.rank_buckets,
            "centred=True": self.centred,
            "objective='normalized'": self.objective == "normalized",
        }
        return [name for name, given in asked.items() if given]
