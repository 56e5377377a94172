"""The stages that follow calibration: solve, spend the budget, swap the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from vitlr.anatomy.mlps import find_mlps
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.mlp_widths import RIDGE, solve_widths
from vitlr.decomposition.ranks import decompose, layer_weights
from vitlr.decomposition.score_widths import has_scores, solve_scores
from vitlr.decomposition.spectra import Narrowing, Spectra
from vitlr.decomposition.value_widths import GRAINS, solve_values
from vitlr.errors import InputError
from vitlr.measuring import cost
from vitlr.ops.linalg.eigenproblems import DAMPING
from vitlr.planning.allocation import Sizes, allocate
from vitlr.planning.budgets import Budget, parse_budget
from vitlr.planning.joint_allocation import WIDTH_SCALE, allocate_jointly
from vitlr.planning.joint_allocation import check_options as check_joint_allocation
from vitlr.planning.options import WORDS, Planning
from vitlr.planning.plans import Plan
from vitlr.runtime.fields import names_of

Progress = Callable[[int, "int | None"], None]


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
    """`planned` with options as a value or as keywords."""
    chosen = Planning.of(options, **changes)
    chosen.check_budget(None if budget is None else parse_budget(budget))
    given = {key: getattr(chosen, key) for key in names_of(Planning)}
    old = {new: word for word, new in WORDS.items()}
    has_hidden = "hidden" in stats.extras
    given["method"] = old.get(m := chosen.settled or ("joint" if has_hidden else "lowrank"), m)
    given["attention"] = old.get(chosen.attention, chosen.attention)
    return planned(model, stats, budget, spectra=spectra, progress=progress, **given)


def planned(
    model: nn.Module,
    stats: Statistics,
    budget: str | Budget | None = None,
    *,
    objective: str | None = None,
    uniform: bool = False,
    ranks: Mapping[str, int] | None = None,
    rank_step: int = 16,
    min_rank: int = 1,
    rank_buckets: int | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    centred: bool | None = None,
    damping: float | None = None,
    method: str = "lowrank",
    prune_rate: float | None = None,
    width_step: int = 16,
    width_scale: float = WIDTH_SCALE,
    compensate: bool = True,
    ridge: float = RIDGE,
    attention: str | None = None,
    spectra: Spectra | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Decide, without changing anything, which layer keeps which rank and width under a budget of what is KEPT.

    `method`: "lowrank" chooses ranks, "prune" the hidden widths of MLPs, "hybrid" widths of MLPs and ranks of all else
    (arXiv 2203.13444), "joint" both for all. See `vitlr.allocation.allocate` and
    `vitlr.joint_allocation.allocate_jointly` for the choices. Widths need statistics with hidden moments; `compensate`
    folds removed neurons into those that stay, by regression with `ridge`, which is relative to their mean variance.
    `attention` ("prune" and "joint") also lets every attention lose directions of queries and keys ("scores", the
    default with "joint" where the statistics hold what it needs; "none" forbids it), value "channels" or whole "heads",
    which need statistics with `hidden="attention"`.
    `spectra` of an earlier plan (`plan.spectra`) save solving again.
    Raises `InputError` for budgets that cannot be read or reached and statistics of another model.
    """
    wanted = None if budget is None else parse_budget(budget)
    check_joint_allocation(
        wanted,
        method=method,
        prune_rate=prune_rate,
        rank_step=rank_step,
        min_rank=min_rank,
        width_step=width_step,
        width_scale=width_scale,
        uniform=uniform,
        ranks=ranks,
        rank_buckets=rank_buckets,
        centred=centred,
        attention=attention,
    )
    if spectra is None:
        damping = DAMPING if damping is None else damping
        spectra = decompose(model, stats, objective, centred=bool(centred), damping=damping, progress=progress)
    elif (
        spectra.fingerprint != stats.fingerprint
        or objective not in (None, spectra.objective)
        or centred not in (None, spectra.centred)
        or damping not in (None, spectra.damping)
    ):
        raise InputError(
            f"these spectra ({spectra.objective}, centred={spectra.centred}, damping={spectra.damping}) are of other "
            "statistics or other options; leave spectra= out"
        )
    if method != "lowrank":
        if attention is None and method == "joint" and has_scores(stats, spectra.objective):
            attention = "scores"
        spectra = with_widths(model, stats, spectra, attention, compensate=compensate, ridge=ridge, progress=progress)
        return allocate_jointly(
            spectra,
            sizes(model, stats),
            wanted,
            method=method,
            prune_rate=prune_rate,
            rank_step=rank_step,
            min_rank=min_rank,
            width_step=width_step,
            width_scale=width_scale,
            include=include,
            exclude=exclude,
        )
    return allocate(
        spectra,
        sizes(model, stats),
        wanted,
        uniform=uniform,
        ranks=ranks,
        rank_step=rank_step,
        min_rank=min_rank,
        rank_buckets=rank_buckets,
        include=include,
        exclude=exclude,
    )


def with_widths(
    model: nn.Module,
    stats: Statistics,
    spectra: Spectra,
    attention: str | None = None,
    *,
    compensate: bool = True,
    ridge: float = RIDGE,
    progress: Progress | None = None,
) -> Spectra:
    """The spectra with the widths of all MLPs and, with `attention`, all attentions; what is there is kept."""
    options: dict[str, Any] = {"compensate": compensate, "ridge": ridge}
    fits = {name: w for name, w in spectra.widths.items() if (w.compensated, w.ridge) == (compensate, ridge)}
    attention = None if attention == "none" else attention
    found: dict[str, Narrowing] = {name: w for name, w in fits.items() if w.kind == "mlp"}
    options |= {"damping": spectra.damping, "progress": progress}
    has_mlps = any(set(mlp.linears) <= set(stats.layers) for mlp in find_mlps(model).values())
    if not found and (has_mlps or attention is None):
        found |= solve_widths(model, stats, spectra.objective, **options)
    if attention is not None:
        values: dict[str, Narrowing] = {name: w for name, w in fits.items() if w.kind == attention}
        if not values and attention == "scores":
            values = dict(solve_scores(model, stats, spectra.objective, **options))
        found |= values or solve_values(model, stats, attention, spectra.objective, **options)
    return replace(spectra, widths=found)


def needs_hidden(method: str, attention: str | None) -> bool | str:
    """What `calibrate(hidden=)` has to measure for a plan."""
    return False if method == "lowrank" else "attention" if attention in GRAINS else True


def sizes(model: nn.Module, stats: Statistics) -> Sizes:
    """Totals of the dense model, and tokens per image, bytes per weight and bias of every layer."""
    weights = layer_weights(model, stats)
    return Sizes(
        total=cost.Cost(cost.count_params(model), stats.macs, cost.count_bytes(model)),
        tokens={name: layer.tokens / max(stats.images, 1) for name, layer in stats.layers.items()},
        itemsize={name: weight.element_size() for name, weight in weights.items()},
        has_bias={name: model.get_submodule(name).bias is not None for name in weights},
    )
