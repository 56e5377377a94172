"""Which gates go: one threshold over all, one for every kind, or what a gate is worth for what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.measuring.cost import count_params
from vitlr.planning.budgets import Budget, parse_budget
from vitlr.pruning.gates import gates, scores
from vitlr.pruning.options import ATTENTION, KINDS, Gating
from vitlr.pruning.sites import Layer, Site, layers, params, saved_by_one


@dataclass(frozen=True)
class Row:
    """One kind of gates: how many there are and stay, and the parameters of the layers that they stand before."""

    kind: str
    gates: int
    kept: int
    params: int
    params_kept: int

    @classmethod
    def total(cls, rows: Sequence[Row]) -> Row:
        """The sum of several."""
        numbers = ([row.gates, row.kept, row.params, row.params_kept] for row in rows)
        return cls("", *map(sum, zip(*numbers, strict=True)))


@dataclass(frozen=True)
class Cut:
    """What stays of every gated tensor, and what that comes to.

    `keep` holds the channels of every site that stay, `at` the largest `|a|` that goes, by kind; `floors` the sites
    that were to vanish and keep their floor; `params` are those of the whole model without gates, `params_kept` what
    is left of them.
    """

    thresholds: str
    wanted: str
    keep: dict[str, Tensor]
    at: dict[str, float]
    floors: tuple[str, ...]
    rows: tuple[Row, ...]
    params: int
    params_kept: int

    @property
    def rate(self) -> float:
        """The share of all gates that goes."""
        return 1 - sum(row.kept for row in self.rows) / sum(row.gates for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; of the channels their number at every site."""
        return {
            "thresholds": self.thresholds,
            "wanted": self.wanted,
            "rate": self.rate,
            "at": self.at,
            "floors": list(self.floors),
            "widths": {name: len(kept) for name, kept in self.keep.items()},
            "kinds": {row.kind: {k: v for k, v in vars(row).items() if k != "kind"} for row in self.rows},
            "params": self.params,
            "params_kept": self.params_kept,
        }

    def __str__(self) -> str:
        """The finding of arXiv 2203.13444 as a table: what goes from attention, what from feed-forward blocks."""
        lines = [f"{'':<13}{'gates':>8}{'pruned':>9}{'of all':>9}{'params':>12}{'kept':>12}{'pruned':>9}{'of all':>9}"]
        heads = [row for row in self.rows if row.kind in ATTENTION]
        hidden = [row for row in self.rows if row.kind not in ATTENTION]
        groups = [(f"  {row.kind}", [row]) for row in self.rows] + [("attention", heads), ("feed-forward", hidden)]
        every = Row.total(self.rows)
        for title, row in ((title, Row.total(rows)) for title, rows in (*groups, ("all", self.rows)) if rows):
            lines.append(
                f"{title:<13}{row.gates:>8,}{1 - row.kept / row.gates:>9.1%}"
                f"{_share(row.gates - row.kept, every.gates - every.kept):>9}"
                f"{row.params:>12,}{row.params_kept:>12,}{1 - row.params_kept / row.params:>9.1%}"
                f"{_share(row.params - row.params_kept, every.params - every.params_kept):>9}"
            )
        lines.append(
            f"{self.thresholds} threshold, {self.wanted}: {self.params:,} parameters -> {self.params_kept:,} "
            f"({self.params_kept / self.params:.1%} kept)"
        )
        if self.floors:
            left = ", ".join(f"{name} ({len(self.keep[name])} kept)" for name in self.floors)
            lines.append(f"all of these were to go: {left}")
        return "\n".join(lines)


def choose(
    model: nn.Module,
    rate: float | None = None,
    *,
    budget: str | Budget | None = None,
    thresholds: str = "global",
    tile: int = 1,
    floor: int = 1,
    of: int | None = None,
) -> Cut:
    """Choose the gates that go, least important first, until a share `rate` of them has gone or a budget is met.

    `thresholds`: "global" compares `|a|` over all gates, as published; "type" within each kind, so that every kind
    loses the same share; "params" compares `|a|` per parameter saved. `budget` ("params:60%") is what is KEPT of the
    model's parameters, `of` what a share is of where that is not the model at hand. Widths are multiples of `tile` (or
    whole), and no site gets less than `floor` channels (at least a tile). The fewest gates that suffice go.
    Raises `InputError` for a rate outside (0, 1), other budgets and what cannot be reached; `NumericalError` for NaN.
    """
    Gating.of(thresholds=thresholds, tile=tile, floor=floor)
    wanted = check_wanted(rate, budget)
    found = {name: gate.site for name, gate in gates(model).items()}
    if not found:
        raise InputError("this model has no gates; put them in first (add_gates)")
    score = scores(model)
    around = layers(model, found)
    total = count_params(model) - sum(site.width for site in found.values())
    full = {name: site.width for name, site in found.items()}
    outside = total - sum(params(around, found, full).values())
    floors = {name: _whole(floor, tile, site.width) for name, site in found.items()}
    names, order = list(found), _order(found, around, score, thresholds)

    def kept(count: int) -> dict[str, int]:
        gone = torch.bincount(order[:count], minlength=len(names)).tolist()
        left = {name: max(full[name] - n, floors[name]) for name, n in zip(names, gone, strict=True)}
        return {name: _whole(n, tile, full[name]) for name, n in left.items()}

    def enough(count: int) -> bool:
        widths = kept(count)
        if isinstance(wanted, Budget):
            limit = wanted.limit(total if of is None else of)
            return outside + sum(params(around, found, widths).values()) <= limit
        return sum(full.values()) - sum(widths.values()) >= wanted * sum(full.values())

    count = _least(enough, len(order))
    if count is None:
        raise InputError(_unreachable(wanted, outside + sum(params(around, found, kept(len(order))).values()), total))
    widths = kept(count)
    keep = {name: _best(score[name], widths[name]) for name in names}
    gone = torch.bincount(order[:count], minlength=len(names)).tolist()
    return Cut(
        thresholds,
        str(wanted) if isinstance(wanted, Budget) else f"{wanted:.10g} of the gates",
        keep,
        _at(found, score, keep),
        tuple(name for name, n in zip(names, gone, strict=True) if full[name] - n < min(floor, full[name])),
        tuple(_row(kind, found, around, widths) for kind in KINDS if any(s.kind == kind for s in found.values())),
        total,
        outside + sum(params(around, found, widths).values()),
    )


def check_wanted(rate: float | None, budget: str | Budget | None) -> float | Budget:
    """The rate or the budget; `InputError` unless exactly one is given and in range."""
    if (rate is None) == (budget is None):
        raise InputError("give either a rate (the share of the gates that goes) or a budget (params:60% is kept)")
    if budget is not None:
        wanted = parse_budget(budget)
        if wanted.quantity != "params":
            raise InputError(f"budget {wanted}: pruning by gates counts parameters; write it as params:60%")
        return wanted
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1:
        raise InputError(f"rate={rate!r}, expected the share of the gates that goes, between 0 and 1")
    return float(rate)


def _order(found: Mapping[str, Site], around: Mapping[str, Layer], score: Mapping[str, Tensor], how: str) -> Tensor:
    """The place of the site of every gate, least important gate first; equal ones in the order of the model."""
    keys = []
    ranks = _ranks(found, score)
    for name, site in found.items():
        key = score[name]
        if how == "params":
            key = key / saved_by_one(around, site)
        elif how == "type":
            key = ranks[name]
        keys.append(key)
    owner = torch.repeat_interleave(torch.arange(len(keys)), torch.tensor([len(key) for key in keys]))
    return owner[torch.cat(keys).sort(stable=True).indices]


def _ranks(found: Mapping[str, Site], score: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rank of every gate among those of its kind, from 0 to 1."""
    ranks: dict[str, Tensor] = {}
    for kind in KINDS:
        names = [name for name, site in found.items() if site.kind == kind]
        if names:
            both = torch.cat([score[name] for name in names])
            place = torch.empty_like(both)
            place[both.sort(stable=True).indices] = torch.arange(len(both), dtype=both.dtype) / len(both)
            ranks.update(zip(names, place.split([len(score[name]) for name in names]), strict=True))
    return ranks


def _best(score: Tensor, count: int) -> Tensor:
    """Numbers of the `count` channels of the highest score, increasing; of equal ones the later stay."""
    return score.sort(stable=True).indices[len(score) - count :].sort().values


def _whole(count: int, tile: int, width: int) -> int:
    return min(math.ceil(count / tile) * tile, width)


def _least(enough: Any, most: int) -> int | None:
    """The least count that is enough, of those up to `most`; None where even that is not."""
    if not enough(most):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _at(found: Mapping[str, Site], score: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> dict[str, float]:
    at: dict[str, float] = {}
    for name, site in found.items():
        gone = torch.ones(site.width, dtype=torch.bool)
        gone[keep[name]] = False
        if gone.any():
            at[site.kind] = max(at.get(site.kind, 0.0), float(score[name][gone].max()))
    return at


def _row(kind: str, found: Mapping[str, Site], around: Mapping[str, Layer], widths: Mapping[str, int]) -> Row:
    """Gates of a kind, and parameters of the layers behind them, before and after."""
    mine = [site for site in found.values() if site.kind == kind]
    read = {name: layer for name, layer in around.items() if layer.reads in {site.name for site in mine}}
    full = {name: site.width for name, site in found.items()}
    before, after = (sum(params(read, found, kept).values()) for kept in (full, widths))
    return Row(kind, sum(site.width for site in mine), sum(widths[site.name] for site in mine), before, after)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _unreachable(wanted: float | Budget, least: int, total: int) -> str:
    if isinstance(wanted, Budget):
        return (
            f"budget {wanted} cannot be reached: with its floor in every layer {least:,} of {total:,} parameters stay"
        )
    return f"rate {wanted:g} cannot be reached: every layer keeps its floor; lower the rate or the tile"


def table(cuts: Mapping[str, Cut] | Sequence[Cut]) -> str:
    """Several cuts of one model under each other, with the share of feed-forward blocks in what goes."""
    named = dict(cuts) if isinstance(cuts, Mapping) else {cut.thresholds: cut for cut in cuts}
    lines = [f"{'threshold':<12}{'gates':>8}{'params':>8}{'qkv':>8}{'proj':>8}{'fc1':>8}{'fc2':>8}{'feed-forward':>15}"]
    for title, cut in named.items():
        gone = {row.kind: 1 - row.kept / row.gates for row in cut.rows}
        lost = {row.kind: row.params - row.params_kept for row in cut.rows}
        share = _share(sum(v for kind, v in lost.items() if kind not in ATTENTION), sum(lost.values()))
        cells = "".join(f"{gone[kind]:>8.1%}" if kind in gone else f"{'-':>8}" for kind in KINDS)
        lines.append(f"{title:<12}{cut.rate:>8.1%}{1 - cut.params_kept / cut.params:>8.1%}{cells}{share:>15}")
    return "\n".join([*lines, "pruned: of all gates, of all parameters, of each kind of gates; and whose parameters"])
