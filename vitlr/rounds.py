"""Rounds: narrow a part of the way, measure again, and plan the rest from what the narrower network says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from vitlr.calibration.statistics import Statistics
from vitlr.errors import InputError
from vitlr.measuring.cost import Cost
from vitlr.planning.budgets import Budget
from vitlr.planning.planner import plan, sizes
from vitlr.planning.plans import Plan
from vitlr.surgery.application import apply

METHODS = ("widths", "joint")  # those that may narrow MLPs
OPTIONS = ("width_step", "compensate", "ridge", "damping")  # options of a plan that rounds share with it


def check_rounds(rounds: int, method: str, budget: Budget | None) -> None:
    """Raise `InputError` for rounds that there are none of, and plans that narrow no MLPs or have no budget."""
    if type(rounds) is not int or not 1 <= rounds <= 8:
        raise InputError(f"rounds={rounds!r}, expected 1 to 8")
    if rounds > 1 and (method not in METHODS or budget is None):
        how = f"method={method!r}" if method not in METHODS else "no budget"
        raise InputError(f"rounds={rounds} narrows MLPs on the way to a budget; it does not go with {how}")


def narrowed(
    model: nn.Module,
    stats: Statistics,
    budget: Budget,
    rounds: int,
    measure: Callable[[nn.Module], Statistics],
    *,
    inplace: bool = False,
    **options: Any,
) -> tuple[nn.Module, Statistics, Budget]:
    """MLPs lose neurons in `rounds − 1` equal ratios of what the budget leaves; the model, its statistics and budget.

    After round i `share^(i / rounds)` of the budget's quantity is left; the rest is for the plan that follows, from
    statistics that `measure` collected on the narrowed model. One calibration tells what small changes of the dense
    network cost; moments of a network that is half-way there are nearer to what the other half will cost. `options` are
    those of `plan`. Raises what planning raises, for example where widths alone cannot go that far.
    """
    total = float(getattr(sizes(model, stats).total, budget.quantity))
    share = min(budget.limit(total) / total, 1.0)
    for done in range(1, rounds):
        part = Budget(budget.quantity, total * share ** (done / rounds), False)
        chosen = plan(model, stats, part, method="widths", **options)
        model = apply(model, chosen, inplace=inplace or done > 1)
        stats = measure(model)
    return model, stats, Budget(budget.quantity, budget.limit(total), False)


def of_the_whole(chosen: Plan, budget: Budget, whole: Cost) -> Plan:
    """A plan of a narrowed model, with the budget and the totals of the dense one."""
    return replace(chosen, budget=str(budget), params=whole.params, macs=whole.macs, bytes=whole.bytes)
