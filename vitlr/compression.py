"""Everything in one call: measure, solve, spend the budget, swap the layers, repair the error."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from vitlr.calibration.loop import calibrate
from vitlr.calibration.options import DEFAULT
from vitlr.calibration.statistics import Statistics
from vitlr.errors import InputError
from vitlr.planning.budgets import Budget, parse_budget
from vitlr.planning.options import Planning
from vitlr.planning.planner import plan
from vitlr.refinement import refine
from vitlr.refinement.ladder import check_free
from vitlr.refinement.recipe import choices, make_recipe, parse_rungs
from vitlr.rounds import OPTIONS, check_rounds, narrowed
from vitlr.runtime.progress import Progress
from vitlr.surgery.application import apply

_CALIBRATE = {"extras", "hidden_memory", "loss_fn", "output_fn", "samples", "seed", "include", "exclude"}
_PLAN = set(Planning.names()) - {"objective", "include", "exclude"}
_REFINE = choices() | {"resume"}


def compress(
    model: nn.Module,
    loader: Iterable[Any],
    budget: str | Budget | None = None,
    *,
    objective: str = DEFAULT,
    rounds: int = 1,
    rungs: str | Sequence[str] = "none",
    inplace: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> nn.Module:
    """Calibrate, plan, apply and, with `rungs`, refine in one call; takes the keywords of all four.

    More `rounds` ("widths" and "joint") narrow MLPs part of the way, calibrate what is left and go on, each for the
    price of a calibration (`vitlr.rounds`). `rungs` are those of `refine`: "none", "refit", "residual" or "joint". A
    `seed` goes to calibration and refinement. Budget and options are checked before any image is read. Raises what the
    stages raise.
    """
    if budget is not None:
        budget = parse_budget(budget)
    known = _CALIBRATE | _PLAN | _REFINE
    unknown = set(options) - known
    if unknown:
        raise InputError(f"compress does not know {min(unknown)!r}; it takes {', '.join(sorted(known))}")
    measured = {key: value for key, value in options.items() if key in _CALIBRATE}
    planned = {key: value for key, value in options.items() if key in _PLAN}
    refined = {key: value for key, value in options.items() if key in _REFINE}
    planning = Planning.of(objective=objective, **{"method": "lowrank"} | planned)
    planning.check_budget(budget)
    check_rounds(rounds, str(planning.method), budget)
    make_recipe({key: value for key, value in refined.items() if key != "resume"})
    if parse_rungs(rungs):
        check_free(model)
    if (rounds > 1 or parse_rungs(rungs)) and isinstance(loader, Iterator):
        raise InputError("calibration uses this loader up, what follows needs it again; pass a list or a DataLoader")
    hidden = planning.hidden

    def measure(network: nn.Module) -> Statistics:
        return calibrate(network, loader, objective=objective, hidden=hidden, progress=progress, **measured)

    stats = measure(model)
    reference = copy.deepcopy(model) if inplace and parse_rungs(rungs) else model
    small = model
    if budget is not None and rounds > 1:
        how = {key: value for key, value in planned.items() if key in OPTIONS}
        small, stats, budget = narrowed(model, stats, budget, rounds, measure, inplace=inplace, **how)
    chosen = plan(small, stats, budget, options=planning)
    small = apply(small, chosen, inplace=inplace or rounds > 1)
    # A budget that all layers fit into leaves no error to repair.
    if not parse_rungs(rungs) or (rounds == 1 and not chosen.changes):
        return small
    return refine(small, reference, loader, rungs=rungs, inplace=True, progress=progress, **refined)
