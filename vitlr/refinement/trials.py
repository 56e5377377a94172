"""Trials: what the parts of a plan cost in the whole network, over what each was predicted to lose by itself.

A prediction is a quadratic of one part in the dense network, true to the extent that the others stay what they are and
that little is taken. How far it falls short differs by kind and by depth, and so a plan mixes them wrongly.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.planning.budgets import Budget, is_timed
from vitlr.planning.options import ROUNDED, Planning
from vitlr.planning.plans import LayerPlan, Plan, WidthPlan
from vitlr.refinement.judge import Judge
from vitlr.runtime import snapshots
from vitlr.runtime.progress import Progress, Watch
from vitlr.runtime.storage import fingerprint
from vitlr.runtime.words import numbered
from vitlr.surgery.application import apply

MOST = 8  # times that a plan may be tried
_SPREAD = 0.5  # by how much of their mean the ratios of a kind's parts differ, before any trial
_BOUND = 3.0  # times the mean of its kind that a part's ratio may be, or may be a part of
_LEAST = 0.1  # of the mean of all that the mean of a kind is taken for


class Part(NamedTuple):
    """What a plan decides at once: an MLP or attention with its linears, or a linear outside of any."""

    kind: str
    linears: frozenset[str]


class Trial(NamedTuple):
    """What a part was predicted to lose, and what the network gains where it is as it was, with its standard error."""

    predicted: float
    cost: float
    error: float


class Snapshots(snapshots.Snapshots):
    """The distances of every image, by a plan and by those that leave one part as it was."""

    kind = "trials"

    @classmethod
    def of(cls, folder: str | os.PathLike[str] | None, plan: Plan, reference: nn.Module, images: str) -> Snapshots:
        """In a folder or nowhere, of the trials that begin with this plan, on images of this fingerprint."""
        digest = hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]
        weights = fingerprint(dict(reference.named_parameters()))
        return cls(folder, {"plan": digest, "reference": weights, "images": images})


def check_trials(trials: int, options: Planning, budget: Budget | None) -> None:
    """Raise `InputError` for a number of trials that there is not, and plans whose parts cannot be put back."""
    if type(trials) is not int or not 0 <= trials <= MOST:
        raise InputError(f"trials={trials!r}, expected a whole number from 0 to {MOST}")
    if not trials:
        return
    for given, asked in (
        ("bits=", bool(options.stored) or options.settled in ROUNDED),
        ("a budget of latency", is_timed(budget)),
        ("no budget", budget is None),
        ("uniform=True", options.uniform),
        ("corrections=, which it finds", options.corrections is not None),
    ):
        if asked:
            raise InputError(
                f"trials={trials} corrects predicted losses of ranks and widths; it does not go with {given}"
            )


def parts_of(plan: Plan) -> dict[str, Part]:
    """All parts of a plan that was just made, whether it changes them or not, by the names that `corrections` take."""
    assert plan.spectra is not None
    names = {row.name for row in plan.layers}
    found: dict[str, Part] = {}
    taken: set[str] = set()
    for narrowing in plan.spectra.widths.values():
        linears = names & {*narrowing.first, narrowing.second}
        found[narrowing.name] = Part(narrowing.kind, frozenset(linears))
        taken |= linears
    alone = (name for name in plan.spectra.layers if name in names - taken)
    return found | {name: Part(numbered(name)[0], frozenset([name])) for name in alone}


def changed(plan: Plan, name: str, part: Part) -> bool:
    """Whether a plan does anything to a part."""
    return name in plan.narrowed or not part.linears.isdisjoint(plan.ranks)


def without(plan: Plan, name: str, part: Part) -> Plan:
    """The plan that leaves a part as it was; its totals are not told."""
    layers = tuple(
        replace(row, rank=None, kept_in=None, kept_out=None) if row.name in part.linears else row for row in plan.layers
    )
    widths = tuple(replace(row, width=row.full_width) if row.name == name else row for row in plan.widths)
    return replace(plan, layers=layers, widths=widths)


def tried(
    model: nn.Module,
    plan: Plan,
    judge: Judge,
    again: Callable[[Mapping[str, float]], Plan],
    *,
    times: int,
    kept: Snapshots,
    watch: Watch,
) -> Plan:
    """The nearest to the dense model of a plan and those that `again` makes with corrected predictions.

    `times` plans are tried, each the successor of the one before, and every part of each: as many runs of the judge's
    images as there are parts. `kept` snapshots let a run that was cut short go on.
    """
    best, nearest, factors = plan, math.inf, dict[str, float]()
    for done in range(times + 1):
        parts = parts_of(plan)
        names = [name for name, part in parts.items() if done < times and changed(plan, name, part)]
        with watch("trying", 1 + len(names), "plans") as told:
            whole, apart = _distances(model, plan, {name: parts[name] for name in names}, judge, kept, done, told)
        if (distance := float(whole.mean())) < nearest:
            best, nearest = plan, distance
        trials = {name: _trial(plan, name, parts[name], whole, each, factors) for name, each in apart.items()}
        factors = corrections(trials, parts)
        if not factors:
            break
        plan = again(factors)
    return best


def corrections(trials: Mapping[str, Trial], parts: Mapping[str, Part]) -> dict[str, float]:
    """Cost over prediction of every part, drawn to the mean of its kind as far as its trial is uncertain.

    With `R` the ratio of the sums over a kind, a part's ratio is normal around R with a deviation of R / 2 before its
    trial, whose cost is normal as well: the mean of both, from R / 3 to 3 R. Parts that were not tried take R, those of
    a kind of which none was the ratio of all. Empty where trials say nothing.
    """
    rated = {name: trial for name, trial in trials.items() if trial.predicted > 0 and math.isfinite(trial.error)}
    of_all = _ratio(rated.values())
    if not of_all > 0:
        return {}
    kinds = {part.kind for part in parts.values()}
    of_kind = {kind: [trial for name, trial in rated.items() if parts[name].kind == kind] for kind in kinds}
    means = {kind: max(_ratio(some), _LEAST * of_all) if some else of_all for kind, some in of_kind.items()}
    found = {}
    for name, part in parts.items():
        mean, trial = means[part.kind], rated.get(name)
        found[name] = mean if trial is None else _drawn(trial, mean)
    return found


def _ratio(trials: Iterable[Trial]) -> float:
    some = list(trials)
    predicted = sum(trial.predicted for trial in some)
    return sum(trial.cost for trial in some) / predicted if predicted > 0 else 0.0


def _drawn(trial: Trial, mean: float) -> float:
    """The mean of a part's ratio after its trial."""
    before, seen = (_SPREAD * mean) ** -2, (trial.predicted / max(trial.error, 1e-12 * trial.predicted)) ** 2
    ratio = (mean * before + trial.cost / trial.predicted * seen) / (before + seen)
    return min(max(ratio, mean / _BOUND), mean * _BOUND)


def _trial(plan: Plan, name: str, part: Part, whole: Tensor, apart: Tensor, factors: Mapping[str, float]) -> Trial:
    """What a part was predicted to lose before any correction, and what it costs on images that both answered."""
    rows: list[LayerPlan | WidthPlan] = [
        *(row for row in plan.layers if row.name in part.linears),
        *(row for row in plan.widths if row.name == name),
    ]
    cost = (whole - apart)[torch.isfinite(whole) & torch.isfinite(apart)]
    error = float(cost.std()) / len(cost) ** 0.5 if len(cost) > 1 else math.inf
    return Trial(sum(row.error for row in rows) / factors.get(name, 1.0), float(cost.mean()), error)


def _distances(
    model: nn.Module,
    plan: Plan,
    parts: Mapping[str, Part],
    judge: Judge,
    kept: Snapshots,
    done: int,
    told: Progress | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The distance of every image by a plan, and by those that leave one part as it was."""
    file, found = f"trials_{done}", kept.load(f"trials_{done}")
    distances = {} if found is None else found[0]
    plans = {"": plan} | {name: without(plan, name, part) for name, part in parts.items()}
    for count, (name, one) in enumerate(plans.items(), 1):
        if distances.get(f"of {name}") is None:
            distances[f"of {name}"] = judge.each(apply(model, one))
            kept.save(file, distances, {})
        if told is not None:
            told(count, len(plans))
    return distances["of "], {name: distances[f"of {name}"] for name in parts}
