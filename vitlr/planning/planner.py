"""The plan: what is read, what counts, what it would cost, what is chosen."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vitlr.anatomy import visibility
from vitlr.anatomy.reading import Parts, read
from vitlr.calibration.options import RANGES
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.levels import measured_linears
from vitlr.decomposition.matrices import matrix_bits
from vitlr.decomposition.mlp_widths import measured_mlps, why_no_widths
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.query_key_widths import has_query_keys
from vitlr.decomposition.solving import solve
from vitlr.decomposition.spectra import Spectra
from vitlr.decomposition.spectra_file import SpectraFile
from vitlr.errors import InputError, NumericalError
from vitlr.measuring.cost import Cost, count_bytes, count_params, count_rest
from vitlr.measuring.losses import certain
from vitlr.measuring.times import Times
from vitlr.planning.allocation import allocate
from vitlr.planning.budgets import Budget, is_timed, parse_budget
from vitlr.planning.forms import Sizes
from vitlr.planning.nats import nats_of_bytes
from vitlr.planning.options import NARROWING, ROUNDED, Planning
from vitlr.planning.pace import Pace, check_times, clocked, shapes_of
from vitlr.planning.plans import Plan
from vitlr.runtime.compact import BITS
from vitlr.runtime.fields import keywords
from vitlr.runtime.progress import Progress, shows

_logger = logging.getLogger("vitlr")


@shows("solving", "layers")
@keywords(Planning)
@visibility.seeing
def plan(
    model: nn.Module,
    stats: Statistics,
    budget: str | Budget | None = None,
    *,
    options: Planning | None = None,
    spectra: Spectra | None = None,
    times: Times | None = None,
    beside: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Plan:
    """Decide, without changing anything, which layer keeps which rank, width or bits under a budget of what is KEPT.

    `changes` are the fields of `Planning`, on top of `options`. `method`: "lowrank" chooses ranks, "widths" the hidden
    widths of MLPs, "widths+ranks" widths of MLPs and ranks of all else (arXiv 2203.13444), "joint" both for all, "bits"
    to what weights are rounded, "mix" ranks, widths and bits together, both under a budget of bytes and from statistics
    with the extra "rounding"; by default the best that model, budget and statistics allow, and the plan says why
    (`Plan.why`). Widths need statistics with hidden moments; `compensate` folds removed neurons into those that stay,
    by regression with `ridge`, which is relative to their mean variance. `attention` ("widths" and "joint") also lets
    every attention lose directions of queries and keys ("query_keys", the default with "joint" where the statistics
    hold what it needs; "none" forbids it), value "channels" or whole "heads", which need statistics with
    `hidden="attention"`.
    `bits` are those that rounded weights may be stored in: 8 alone rounds all of them so and needs no budget, (8, 4)
    leaves the choice to a budget of bytes; under a budget of params or MACs what is left is rounded on top.
    Under a budget of latency (`latency:60%`, `latency:12ms`) costs are times that were measured on this machine, for
    `batch_size` images on `threads`, in the model's dtype; from statistics with the extra "ranges" layers may multiply
    bytes as well (`Plan.bytes_layers`). `times` are `Plan.times` of an earlier plan, or `clocked`'s.
    `spectra` of an earlier plan (`plan.spectra`) save solving again, and so do those that are kept `beside` the file
    from which the statistics are (`F.spectra.safetensors` for `F.safetensors`): used where they fit, written otherwise.
    Raises `InputError` for budgets that cannot be read or reached and statistics of another model.
    """
    wanted = None if budget is None else parse_budget(budget)
    options = Planning.of(options, **changes)
    options.check_budget(wanted)
    parts, pace = read(model), None
    if is_timed(wanted):
        check_times(times, options)
        times = times or clocked(model, stats, options)
        if RANGES not in stats.extras:
            if options.attention == "query_keys":
                raise InputError(
                    "attention='query_keys' saves time where layers multiply bytes, for which these statistics hold no "
                    "ranges; collect them with extras=('ranges',), or leave it out"
                )
            options = replace(options, attention="none")  # shorter queries and keys save time in blocks of bytes alone
        pace = Pace(times, shapes_of(parts, stats, times.batch_size))
    objective = Objective.of(stats, options, spectra)
    if objective.by_gradient and (doubt := stats.notes.get("certain")) is not None:
        _logger.warning("%s", certain(float(doubt)))
    failed: list[NumericalError] = []
    asked = options.method is not None
    options, kinds, why = settle(options, wanted, parts, stats, objective)
    ranked = options.method == "joint" and not options.rounds(wanted.quantity if wanted else "params")
    step = options.width_step if ranked else 0
    how: dict[str, Any] = {"step": step, "skip": failed.append, "progress": progress}
    kept = None if beside is None or spectra is not None else SpectraFile(Path(beside), stats, objective, options, step)
    if kept is not None:
        spectra, how["at_hand"] = kept.spectra, kept.widths
    spectra = solve(parts, stats, objective, kinds, options, known=spectra, **how)
    if kept is not None:
        kept.keep(spectra)
    if failed and options.method == "widths" and not spectra.widths:  # there is nothing else in such a plan
        raise failed[0]
    if failed and asked:
        _logger.warning("%d left as wide as they are (%s)", len(failed), failed[0])
    elif failed:
        why += f"; {len(failed)} left as wide as they are ({failed[0]})"
        options = options if spectra.widths or options.method == "mix" else replace(options, method="lowrank")
    bytes_loss = {} if pace is None else nats_of_bytes(parts, stats)
    free = objective if options.method in ROUNDED and not options.stored else None
    chosen = allocate(spectra, sizes(model, stats, "rounding" in kinds, free), wanted, options, pace, bytes_loss)
    return replace(chosen, why=why, image=stats.image)


def settle(
    options: Planning, budget: Budget | None, parts: Parts, stats: Statistics, objective: Objective
) -> tuple[Planning, list[str], str]:
    """The options with a method, the kinds of what is solved, and why it is this method."""
    method, why = options.settled, ""
    mlps, no_mlps = _mlps(parts, stats, objective) if method in (None, "mix") else (0, "")
    if method is not None and options.method is None:
        why = f"{options.of_ranks()[0]} goes with no other"
    elif method is None and options.attention not in (None, "none"):
        method, why = "joint", f"attention={options.attention!r} was asked for"
    elif method is None and budget is None:
        method, why = "bits", "bits= was given without a budget"
    elif method is None and budget is not None and budget.quantity == "bytes" and _roundable(options, stats, objective):
        method, why = "mix", "both sides of all layers were measured" + (f"; {no_mlps}" if no_mlps else "")
    elif method is None:
        method = "lowrank" if no_mlps and not has_query_keys(stats, objective) else "joint"
        why = no_mlps or f"the hidden neurons of {mlps} MLPs were measured"
    rounding = ["rounding"] if method in ROUNDED or options.stored else []
    if rounding and method not in ("bits", "widths"):
        rounding.append("factors")
    if method not in NARROWING or (method == "mix" and no_mlps):
        return replace(options, method=method), rounding, why
    attention = None if options.attention == "none" else options.attention
    if options.attention is None and method == "joint" and not rounding and has_query_keys(stats, objective):
        attention = "query_keys"
    stays = why_no_widths(parts, stats, objective) if method == "joint" else ""
    if stays:
        stays = f"no MLP gets narrower: {stays}"
        why = why or stays
        if options.method is not None:
            _logger.warning("%s", stays)
    kinds = ["mlp"] if not stays and (attention is None or parts.mlps_among(stats.layers)) else []
    return replace(options, method=method), [*kinds, *([attention] if attention else []), *rounding], why


def _mlps(parts: Parts, stats: Statistics, objective: Objective) -> tuple[int, str]:
    """How many MLPs can get narrower, and why there is none."""
    try:
        return len(measured_mlps(parts, stats, objective)), ""
    except InputError as reason:
        return 0, str(stats.notes.get("no_hidden", reason))


def _roundable(options: Planning, stats: Statistics, objective: Objective) -> bool:
    """Whether the statistics hold what rounding needs, or that was asked for all the same."""
    try:
        return bool(measured_linears(stats, objective))
    except InputError:
        if options.stored:
            raise
        return False


def sizes(model: nn.Module, stats: Statistics, rounded: bool = False, free: Objective | None = None) -> Sizes:
    """Totals of the dense model, and tokens per image, bytes per weight and bias of every layer; and of all else.

    Where an objective is `free` to choose, so are the bits of the matrices among all else.
    """
    matrices = {} if free is None else matrix_bits(model, stats, free)
    chosen_for = sum(round(known[BITS[0]][0]) for known in matrices.values())
    linears = {name: linear for name, linear in read(model).linears.items() if name in stats.layers}
    return Sizes(
        total=Cost(count_params(model), stats.macs, count_bytes(model)),
        tokens={name: layer.tokens / max(stats.images, 1) for name, layer in stats.layers.items()},
        itemsize={name: linear.weight.element_size() for name, linear in linears.items()},
        has_bias={name: linear.bias is not None for name, linear in linears.items()},
        rest=count_rest(model, stats.layers) - chosen_for if rounded else 0,
        matrices=matrices,
    )
