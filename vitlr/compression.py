"""Everything in one call: measure, narrow in rounds, solve and spend the budget, swap the layers, repair the error."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from vitlr.anatomy import linears, visibility
from vitlr.anatomy.mlps import find_mlps
from vitlr.calibration.loop import calibrate
from vitlr.calibration.options import GRADIENT_OBJECTIVES, RANGES, ROUNDING, Calibration
from vitlr.calibration.resuming import exactly
from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint.origins import why_not_rebuilt
from vitlr.errors import InputError
from vitlr.measuring.cost import Cost, count_bytes, count_params
from vitlr.planning.budgets import Budget, OutOfReach, is_timed, parse_budget
from vitlr.planning.options import ROUNDED, Planning
from vitlr.planning.pace import check_machine, clocked
from vitlr.planning.plan_kinds import ROUNDS
from vitlr.planning.planner import plan
from vitlr.planning.plans import Plan
from vitlr.refinement.images import Proxy
from vitlr.refinement.judge import Judge
from vitlr.refinement.ladder import check_free, refine
from vitlr.refinement.recipe import Recipe, parse_rungs
from vitlr.refinement.report import Refinement
from vitlr.refinement.trials import Snapshots, check_trials, tried
from vitlr.runtime.copies import duplicate
from vitlr.runtime.fields import check_names, keywords, own
from vitlr.runtime.modules import uncompiled
from vitlr.runtime.progress import Progress, Watch, alone, shown
from vitlr.surgery.application import apply
from vitlr.surgery.fusion import fuse
from vitlr.surgery.promises import bytes_names, corrected, multiply_planned, timed, within_reach

_logger = logging.getLogger(__name__)
NARROWING = ("widths", "joint")  # the methods that rounds serve
Measure = Callable[[nn.Module], Statistics]


@dataclass(frozen=True)
class Compressed:
    """What came of it: the model, the plan it was made by, what refinement did, and the statistics that were last."""

    model: nn.Module
    plan: Plan
    report: Refinement | None
    statistics: Statistics
    images: int  # of the first calibration


@dataclass(frozen=True)
class Stages:
    """The options of all stages, checked together before any image is read."""

    budget: Budget | None
    calibration: Calibration
    planning: Planning
    recipe: Recipe
    rungs: tuple[str, ...]
    asked: dict[str, Any]  # of calibration, by name

    @property
    def timed(self) -> bool:
        """Whether milliseconds are the budget."""
        return is_timed(self.budget)


@alone
@keywords(Planning, Calibration, Recipe)
def compressed(
    model: nn.Module,
    loader: Iterable[Any] | None,
    budget: str | Budget | None = None,
    *,
    rounds: int = 1,
    trials: int = 0,
    rungs: str | Sequence[str] = "none",
    stats: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    calibration: Calibration | None = None,
    planning: Planning | None = None,
    recipe: Recipe | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    inplace: bool = False,
    plan_only: bool = False,
    measure: Measure | None = None,
    decided: Callable[[Plan], None] | None = None,
    progress: Progress | bool | None = None,
    watch: Watch | None = None,
    **changes: Any,
) -> Compressed:
    """Calibrate, plan, apply and, with `rungs`, refine; takes the options of all four, as values or as keywords.

    `stats` names a file of statistics: used if it is there and fits, written otherwise, gone on from where it was cut
    short (`calibrate(resume=)`), with the spectra solved from it beside it (`plan(beside=)`); `resume` a folder of
    snapshots of trials and refinement. More `rounds` ("widths" and "joint") narrow MLPs part of the way, calibrate what
    is left and go on, each at the price of a calibration. With `trials` the plan is tried on a sixth of the images,
    part by part, and made again by what each costs over what was predicted, so many times; the nearest one is taken
    (`vitlr.refinement.trials`). `rungs` are those of `refine`: "none", "rescale", "refit", "regrow" or "distil". A
    `seed` goes to calibration and refinement.

    `measure(model)` takes the place of every calibration. `decided` sees the plan before anything is changed;
    `plan_only` stops there. `watch("calibrating", total, unit)` is entered for every stage and gives its `progress`.
    The plan stays with the model, in `vitlr_info` and so in its file.

    Under a budget of latency, for `batch_size` images on `threads`, the plan is tried and corrected, twice at most,
    before it is carried out, layers that multiply bytes get their ranges by another calibration of what refinement
    left, and the model comes back fused, as it was measured: `plan.latency` says what was promised and what it takes.
    Budget and options are checked before any image is read. Raises what the stages raise.
    """
    model = uncompiled(model)
    stages = read_options(budget, rounds, rungs, stats, calibration, planning, recipe, changes, trials)
    if stages.rungs:
        check_free(model)
    if stages.timed:
        check_machine(model, stages.planning)
    if rounds > 1 or trials or stages.rungs or stages.timed:
        if isinstance(loader, Iterator):
            raise InputError(
                "calibration uses this loader up, what follows needs it again; give a list or a DataLoader"
            )
        if loader is None and (stages.rungs or trials or measure is None):
            raise InputError("loader= is missing: refinement, trials, and more rounds than one need images")
    if not plan_only and (problem := why_not_rebuilt(model)) is not None:
        _logger.warning("the result can be saved with model_args= only: %s", problem)
    watch = watch or (lambda label, total=None, unit="images": shown(progress, label, total, unit))
    with visibility.visible(model):
        layers = tuple(linears.targets(model, stages.calibration.include, stages.calibration.exclude))

        if stages.calibration.hidden is True and stages.planning.settled == "joint" and not find_mlps(model):
            stages = replace(stages, calibration=replace(stages.calibration, hidden=None))  # ranks, queries and keys

    def calibrated(network: nn.Module, options: Calibration, file: Any = None, **asked: Any) -> Statistics:
        with watch("calibrating") as advance:
            how: dict[str, Any] = {"loss_fn": loss_fn, "output_fn": output_fn, "resume": file, "progress": advance}
            return calibrate(network, loader, options=options, **how, **asked)

    measured = measure(model) if measure else calibrated(model, stages.calibration, stats, **stages.asked)
    whole, images = Cost(count_params(model), measured.macs, count_bytes(model)), measured.images
    reference = duplicate(model) if inplace and (stages.rungs or trials or stages.timed) else model
    options = stages.planning
    if len(layers) < len(measured.layers):
        options = replace(options, include=exactly(layers), exclude=None)
    small, left = model, stages.budget
    earlier: tuple[Plan, ...] = ()
    if left is not None and rounds > 1:
        # As the first time: its statistics may be of another objective or more draws than are the default.
        again = replace(
            stages.calibration,
            objective=options.objective or measured.default_objective,
            samples=measured.samples,
            seed=measured.seed,
            include=exactly(layers),
            exclude=None,
        )
        once_more = measure or (lambda network: calibrated(network, again))
        small, measured, left, earlier = narrowed(small, measured, left, whole, rounds, once_more, options, inplace)

    times = None
    if stages.timed:
        with watch("timing", None, "shapes") as advance:
            times = clocked(small, measured, options, progress=advance)
    with watch("solving", len(measured.layers), "layers") as advance:
        beside = stats if measure is None and rounds == 1 else None  # a narrowed model's are of no file
        far: OutOfReach | None = None
        try:
            chosen = plan(small, measured, left, options=options, times=times, beside=beside, progress=advance)
            spectra = chosen.spectra
        except OutOfReach as cause:
            if not stages.timed or plan_only:
                raise
            far, spectra = cause, cause.spectra

    def planned(goal: Budget | None, **more: Any) -> Plan:
        """Another plan from what is solved."""
        return plan(small, measured, goal, options=options, spectra=spectra, times=times, **more)

    if trials and chosen.changes:
        proxy = Proxy(loader)  # type: ignore[arg-type]
        judge = Judge(reference, proxy.held, stages.recipe.batch_size, output_fn)
        kept = Snapshots.of(resume, chosen, reference, proxy.fingerprint)
        how_tried: dict[str, Any] = {"times": trials, "kept": kept, "watch": watch}
        chosen = tried(small, chosen, judge, lambda found: planned(left, corrections=found), **how_tried)
    if stages.timed and stages.budget is not None and not plan_only:
        if far is not None:
            chosen = within_reach(small, stages.budget, planned, far)
        else:
            chosen = corrected(small, chosen, stages.budget, planned)
    if stages.budget is not None:  # of the whole, also where rounds have taken a part
        chosen = replace(chosen, budget=str(stages.budget), params=whole.params, macs=whole.macs, bytes=whole.bytes)
    last, chosen = chosen, replace(chosen, earlier=earlier)
    if decided is not None:
        decided(chosen)
    if plan_only:
        return Compressed(small, chosen, None, measured, images)

    with watch("applying", None, "layers") as advance:
        small = apply(small, last, inplace=inplace or rounds > 1, progress=advance)
    record(small, chosen, measured, rounds, images)
    report: Refinement | None = None
    # A budget that all layers fit into leaves no error to repair.
    if stages.rungs and loader is not None and (rounds > 1 or chosen.changes):
        how: dict[str, Any] = {"rungs": stages.rungs, "recipe": stages.recipe, "resume": resume}
        small = refine(small, reference, loader, inplace=True, output_fn=output_fn, watch=watch, **how)
        report = small.vitlr_refinement  # type: ignore[assignment]
    if chosen.latency is not None:
        if names := bytes_names(small, chosen):
            how_bytes = replace(stages.calibration, **_ranges(stages.calibration, names))
            ranges = measure(small) if measure else calibrated(small, how_bytes)
            multiply_planned(small, ranges)
        chosen = replace(chosen, latency=timed(reference, small, chosen.latency, measured.image))
        small = fuse(small, inplace=True)
        record(small, chosen, measured, rounds, images)
    return Compressed(small, chosen, report, measured, images)


def _ranges(options: Calibration, names: Sequence[str]) -> dict[str, Any]:
    """What changes in a calibration that only measures the ranges of these linears, and what they are worth."""
    by_gradient = any(name in GRADIENT_OBJECTIVES for name in options.objectives)
    objective = "loss" if by_gradient else "output"
    return {"objective": objective, "extras": (RANGES,), "hidden": False, "include": exactly(names), "exclude": None}


def record(model: nn.Module, chosen: Plan, measured: Statistics, rounds: int, images: int) -> None:
    """Leave with the model, for its file, what was decided and from what."""
    recipe = {key: getattr(chosen, key) for key in ("budget", "objective", "method", "centred")}
    recipe |= {"rounds": rounds, "images": images, "samples": measured.samples, "seed": measured.seed}
    recipe["data"] = measured.notes.get("data")
    info = getattr(model, "vitlr_info", None) or {}
    model.vitlr_info = {**info, "plan": chosen.to_dict(), "recipe": recipe}  # type: ignore[assignment]


def compress(model: nn.Module, loader: Iterable[Any], budget: str | Budget | None = None, **options: Any) -> nn.Module:
    """The model of `compressed`, which says all about the options."""
    return compressed(model, loader, budget, **options).model


compress.__signature__ = inspect.signature(compressed).replace(return_annotation="nn.Module")  # type: ignore[attr-defined]


def read_options(
    budget: str | Budget | None,
    rounds: int = 1,
    rungs: str | Sequence[str] = "none",
    stats: str | os.PathLike[str] | None = None,
    calibration: Calibration | None = None,
    planning: Planning | None = None,
    recipe: Recipe | None = None,
    changes: Mapping[str, Any] = MappingProxyType({}),
    trials: int = 0,
) -> Stages:
    """The options by stage; `InputError` for what is unknown, out of range or does not go together."""
    check_names(changes, Planning, Calibration, Recipe)
    goal = None if budget is None else parse_budget(budget)
    asked = {key: value for key, value in own(Calibration, changes).items() if key != "objective" or value is not None}
    measuring = Calibration.of(calibration, **asked)
    # Layers are chosen by what is measured; of several objectives a plan takes the first.
    planned = {key: value for key, value in own(Planning, changes).items() if key not in ("include", "exclude")}
    repairs, timed = own(Recipe, changes), is_timed(goal)
    (repairs if timed else planned).pop("batch_size", None)  # it is of one or of the other
    if not isinstance(planned.get("objective"), str | None):
        planned["objective"] = None
    deciding = Planning.of(planning, **planned)
    deciding.check_budget(goal)
    unmeasured = stats is None or not Path(stats).exists()  # else the file says what a plan can be made of
    if deciding.objective is None and unmeasured:
        replace(deciding, objective=measuring.objectives[0])  # refused where that one does not go with the rest
    if rounds > 1 and deciding.settled is None:
        deciding = replace(deciding, method="joint")
    check_rounds(rounds, deciding, goal)
    check_trials(trials, deciding, goal)
    if measuring.hidden is None and (deciding.settled is not None or deciding.hidden == "attention"):
        measuring = replace(measuring, hidden=deciding.hidden)
    wanted = parse_rungs(rungs)
    if deciding.extras and wanted and "distil" not in wanted:
        method = f"method={deciding.settled!r}" if deciding.settled in ROUNDED else "bits="
        raise InputError(f"rungs={rungs!r} moves weights that {method} makes integers; take rungs='distil'")
    rounding = bool(deciding.extras) or (unmeasured and rounds_by_itself(goal, deciding, wanted))
    if rounding and calibration is None and "objective" not in asked and deciding.objective is None:
        measuring = replace(measuring, objective="loss")  # sums of single images would be measured for nothing
    if rounding and ROUNDING not in measuring.extras:
        measuring = replace(measuring, extras=(*measuring.extras, ROUNDING))
    if timed and unmeasured and RANGES not in measuring.extras:
        measuring = replace(measuring, extras=(*measuring.extras, RANGES))
    repairing = Recipe.of(recipe, **repairs)
    return Stages(goal, measuring, deciding, repairing, wanted, asked)


def rounds_by_itself(budget: Budget | None, options: Planning, rungs: Sequence[str]) -> bool:
    """Whether bytes are the budget and no option keeps a plan from rounding weights, which saves most of them."""
    free = options.settled is None and options.attention in (None, "none")
    return free and budget is not None and budget.quantity == "bytes" and set(rungs) <= {"distil"}


def check_rounds(rounds: int, options: Planning, budget: Budget | None) -> None:
    """Raise `InputError` for rounds that there are none of, and plans that narrow no MLPs or have no budget."""
    if type(rounds) is not int or not 1 <= rounds <= ROUNDS:
        raise InputError(f"rounds={rounds!r}, expected a whole number from 1 to {ROUNDS}")
    if rounds > 1 and is_timed(budget):
        raise InputError(f"rounds={rounds} counts what is counted, not times; it does not go with {budget}")
    if rounds > 1 and options.stored:
        raise InputError(f"rounds={rounds} counts weights that are not rounded; it does not go with bits=")
    if rounds > 1 and (options.settled not in NARROWING or budget is None):
        how = f"method={options.settled!r}" if options.settled not in NARROWING else "no budget"
        raise InputError(f"rounds={rounds} narrows MLPs on the way to a budget; it does not go with {how}")


def narrowed(
    model: nn.Module,
    stats: Statistics,
    budget: Budget,
    whole: Cost,
    rounds: int,
    measure: Measure,
    options: Planning,
    inplace: bool,
) -> tuple[nn.Module, Statistics, Budget, tuple[Plan, ...]]:
    """MLPs lose neurons in `rounds − 1` equal ratios of what the budget leaves; model, statistics, budget and plans.

    After round i `share^(i / rounds)` of the budget's quantity is left; the rest is for the plan that follows, from
    statistics that `measure` collected on the narrowed model. One calibration tells what small changes of the dense
    network cost; moments of a network that is half-way there are nearer to what the other half will cost.
    Raises what planning raises, for example where widths alone cannot go that far.
    """
    total = float(getattr(whole, budget.quantity))
    share = min(budget.limit(total) / total, 1.0)
    widths, plans = replace(options, method="widths", attention=None), []
    for done in range(1, rounds):
        part = Budget(budget.quantity, total * share ** (done / rounds), False)
        chosen = plan(model, stats, part, options=widths)
        model = apply(model, chosen, inplace=inplace or done > 1)
        stats = measure(model)
        plans.append(replace(chosen, spectra=None))  # as large as the model
    return model, stats, Budget(budget.quantity, budget.limit(total), False), tuple(plans)
