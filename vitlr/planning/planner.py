"""The plan: what is read, what counts, what it would cost, what is chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from vitlr.anatomy.reading import Parts, read
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.mlp_widths import measured_mlps
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.query_key_widths import has_query_keys
from vitlr.decomposition.solving import solve
from vitlr.decomposition.spectra import Spectra
from vitlr.errors import InputError, NumericalError
from vitlr.measuring.cost import Cost, count_bytes, count_params, count_rest
from vitlr.planning.allocation import allocate
from vitlr.planning.budgets import Budget, parse_budget
from vitlr.planning.forms import Sizes
from vitlr.planning.options import NARROWING, ROUNDED, Planning
from vitlr.planning.plans import Plan
from vitlr.runtime.fields import keywords
from vitlr.runtime.progress import Progress


@keywords(Planning)
def plan(
    model: nn.Module,
    stats: Statistics,
    budget: str | Budget | None = None,
    *,
    options: Planning | None = None,
    spectra: Spectra | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Plan:
    """Decide, without changing anything, which layer keeps which rank, width or bits under a budget of what is KEPT.

    `changes` are the fields of `Planning`, on top of `options`. `method`: "lowrank" chooses ranks, "widths" the hidden
    widths of MLPs, "widths+ranks" widths of MLPs and ranks of all else (arXiv 2203.13444), "joint" both for all, "bits"
    to what weights are rounded, under a budget of bytes, from statistics with the extra "rounding"; by default
    the best that model and statistics allow, and the plan says why (`Plan.why`). Widths need statistics with
    hidden moments; `compensate` folds removed neurons into those that stay, by regression with `ridge`, which is
    relative to their mean variance. `attention` ("widths" and "joint") also lets every attention lose directions of
    queries and keys ("query_keys", the default with "joint" where the statistics hold what it needs; "none" forbids
    it), value "channels" or whole "heads", which need statistics with `hidden="attention"`.
    `spectra` of an earlier plan (`plan.spectra`) save solving again.
    Raises `InputError` for budgets that cannot be read or reached and statistics of another model.
    """
    wanted = None if budget is None else parse_budget(budget)
    options = Planning.of(options, **changes)
    options.check_budget(wanted)
    parts = read(model)
    objective = Objective.of(stats, options, spectra)
    failed: list[NumericalError] = []
    asked = options.method
    skip = failed.append if asked in (None, "joint") else None  # who asks for widths alone hears what failed
    options, kinds, why = settle(options, parts, stats, objective)
    spectra = solve(parts, stats, objective, kinds, options, known=spectra, skip=skip, progress=progress)
    if failed:
        if asked is not None and not spectra.widths:
            raise failed[0]
        left = f"{len(failed)} left as wide as they are ({failed[0]})"
        why = f"{why}; {left}" if why else left
        options = options if spectra.widths else replace(options, method="lowrank")
    return replace(allocate(spectra, sizes(model, stats, options.method), wanted, options), why=why, image=stats.image)


def settle(options: Planning, parts: Parts, stats: Statistics, objective: Objective) -> tuple[Planning, list[str], str]:
    """The options with a method, the kinds of what gets narrower, and why it is this method."""
    method, why = options.settled, ""
    if method is not None and options.method is None:
        why = f"{options.of_ranks()[0]} goes with no other"
    elif method is None and options.attention not in (None, "none"):
        method, why = "joint", f"attention={options.attention!r} was asked for"
    elif method is None:
        try:
            mlps = measured_mlps(parts, stats, objective)
            method, why = "joint", f"the hidden neurons of {len(mlps)} MLPs were measured"
        except InputError as reason:
            method, why = "lowrank", stats.notes.get("no_hidden", str(reason))
    rounding = ["rounding"] if method in ROUNDED else []
    if method not in NARROWING:
        return replace(options, method=method), rounding, why
    attention = None if options.attention == "none" else options.attention
    if options.attention is None and method == "joint" and has_query_keys(stats, objective):
        attention = "query_keys"
    kinds = ["mlp"] if attention is None or parts.mlps_among(stats.layers) else []
    return replace(options, method=method), [*kinds, *([attention] if attention else []), *rounding], why


def sizes(model: nn.Module, stats: Statistics, method: str | None = None) -> Sizes:
    """Totals of the dense model, and tokens per image, bytes per weight and bias of every layer; by "bits" the rest."""
    linears = {name: linear for name, linear in read(model).linears.items() if name in stats.layers}
    return Sizes(
        total=Cost(count_params(model), stats.macs, count_bytes(model)),
        tokens={name: layer.tokens / max(stats.images, 1) for name, layer in stats.layers.items()},
        itemsize={name: linear.weight.element_size() for name, linear in linears.items()},
        has_bias={name: linear.bias is not None for name, linear in linears.items()},
        rest=count_rest(model, stats.layers) if method in ROUNDED else 0,
    )
