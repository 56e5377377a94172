"""Allocation: spend one budget over all layers, so that the predicted error of the whole model is least.

A linear is one item, and so is an MLP or attention that may get narrower: its choices are a width and a rank, or dense,
for each of its linears as they are at that width. Losses of a width and of the ranks within it add up, since what a
compensated width loses is uncorrelated with what it keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from vitlr.decomposition.spectra import Spectra
from vitlr.errors import InputError
from vitlr.planning.buckets import bucketed
from vitlr.planning.budgets import Budget, OutOfReach
from vitlr.planning.choices import Item, best
from vitlr.planning.fixed_ranks import by_hand, uniform
from vitlr.planning.forms import Sizes
from vitlr.planning.knapsack import Prices, choose
from vitlr.planning.offers import Offers
from vitlr.planning.options import Planning
from vitlr.planning.pace import Pace
from vitlr.planning.plans import Plan
from vitlr.planning.rows import planned
from vitlr.planning.timed import TimedOffers

PROMISE = 0.1  # share of bits' loss that a mix has to save: with less it lost 3 to 6 % more, held-out images say


def allocate(
    spectra: Spectra,
    sizes: Sizes,
    budget: Budget | None,
    options: Planning,
    pace: Pace | None = None,
    bytes_loss: Mapping[str, float] = MappingProxyType({}),
) -> Plan:
    """Choose a rank, or dense, for every layer, and a width for everything that `spectra` has widths of.

    `options.method`: "lowrank" (or None) changes ranks only, "widths" widths only, "widths+ranks" widths of MLPs and
    ranks of everything else (arXiv 2203.13444); "joint" offers MLPs every combination; "bits" rounds weights.
    Ranks are multiples of `rank_step` from `min_rank` up to where low rank stops being smaller than dense; widths
    multiples of `width_step`, and at least one step of everything stays. Equal spectra give an equal plan.
    A budget of milliseconds counts by `pace`, and linears that `bytes_loss` names may multiply bytes.

    Raises `InputError` where the budget cannot be reached, saying what can be, and for bad arguments.
    """
    options.check_budget(budget)
    if not spectra.layers:
        raise InputError("there is no layer to compress")
    parts = {*spectra.layers, *(narrowing.name for narrowing in spectra.widths.values())}
    if foreign := set(options.corrections or {}) - parts:
        raise InputError(f"corrections= names {min(foreign)!r}, which is no layer, MLP or attention of this plan")
    quantity = budget.quantity if budget else "bytes" if options.settled == "bits" else "params"
    common = (spectra, sizes, quantity, options, options.matching(list(spectra.layers)))
    offers = Offers(*common) if pace is None else TimedOffers(*common, pace, bytes_loss)
    if options.ranks is not None:
        chosen = by_hand(offers, options.ranks)
    else:
        items = [*offers.items(), *offers.matrices()]
        chosen = _within(offers, items if options.prune_rate is None else _at_rate(items, options.prune_rate), budget)
    if options.stored and not offers.rounds:
        chosen = [offers.rounded(item) for item in chosen]
    plan = planned(offers, chosen, budget)
    if budget is None or plan.latency is not None:
        return plan
    kept = getattr(plan, f"{quantity}_kept")
    if kept > budget.limit(offers.whole) + 0.5:
        raise InputError(f"the ranks given keep {kept:,} {quantity}, over the budget {budget}")
    return plan


def _within(offers: Offers, items: Sequence[Item], budget: Budget | None) -> list[Item]:
    """Every item with its one choice, in what the budget leaves to them; `InputError` where nothing fits."""
    if budget is None:
        return [item.only([int(np.argmin(item.prices.cost))]) for item in items]
    options, whole = offers.options, offers.whole
    outside = offers.outside(items)
    room = budget.limit(whole) - outside
    if options.uniform:
        chosen = uniform(offers, items, room)
    elif options.rank_buckets:
        chosen = bucketed(offers, items, room, options.rank_buckets)
    else:
        chosen = _mixed(offers, items, room) if offers.rounds else best(items, room)
    if chosen is not None:
        return chosen
    least = outside + sum(item.prices.cost.min() for item in items)
    steps = {
        "lowrank": "a smaller rank step",
        "widths": "a smaller width step",
        "bits": "a smaller model",
        "mix": "a smaller width step",
    }
    other = "" if offers.method in ("joint", "bits", "mix") else ", or use method='joint'"
    raise OutOfReach(
        f"budget {budget} cannot be reached with method={offers.method!r}: the smallest plan keeps {least / whole:.2%} "
        f"({offers.said(least)} of {offers.said(whole)}; {outside / whole:.2%} lie outside the compressible layers); "
        f"raise the budget, or take {steps.get(offers.method, 'smaller rank and width steps')}{other}",
        least,
        offers.spectra,
    )


def _mixed(offers: Offers, items: Sequence[Item], room: float) -> list[Item] | None:
    """The knapsack; of the linears' bits alone, where ranks, widths and bits of all else promise too little beside."""
    chosen, alone = best(items, room), best([offers.bits_alone(item) for item in items], room)
    if chosen is None or alone is None:
        return chosen
    with_all, with_bits = (sum(float(item.prices.loss[0]) for item in found) for found in (chosen, alone))
    return alone if (1 - PROMISE) * with_bits <= with_all else chosen


def _at_rate(items: Sequence[Item], rate: float) -> list[Item]:
    """Settle the widths of all MLPs: those at which `rate` of all hidden neurons goes at the least loss."""
    mlps = [item for item in items if item.narrowing is not None]
    neurons = [np.array([float(choice.width or 0) for choice in item.choices]) for item in mlps]
    total = sum(item.narrowing.full_width for item in mlps if item.narrowing is not None)
    limit = (1 - rate) * total
    picked = choose([Prices(n, item.prices.loss) for n, item in zip(neurons, mlps, strict=True)], limit)
    if picked is None:
        least = sum(n.min() for n in neurons)
        raise InputError(
            f"prune_rate={rate:g} cannot be reached: {least:,.0f} of {total:,.0f} hidden neurons must stay at this "
            "width_step, and those of layers left out"
        )
    settled = {id(item): item.only([index]) for item, index in zip(mlps, picked, strict=True)}
    return [settled.get(id(item), item) for item in items]
