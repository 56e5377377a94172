"""Few different ranks: layers of one position in the blocks share them, as kernels and compilers like it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np

from vitlr.planning.choices import Item, best
from vitlr.planning.offers import Offers


def bucketed(offers: Offers, items: Sequence[Item], room: float, buckets: int) -> list[Item] | None:
    """The knapsack, and once more over quantiles of the ranks that it chose first, `buckets` a position."""
    chosen = best(items, room)
    if chosen is None:
        return None
    positions: dict[tuple[str, int, int], list[int]] = {}
    for index, item in enumerate(items):  # stages of other widths (Swin) are positions of their own
        (name,) = item.linears
        key = (re.sub(r"\d+", "*", name), *offers.shape(None, name, None))
        positions.setdefault(key, []).append(index)
    for spare in (0, 1):  # the tightest budgets need a bucket for the smallest rank
        allowed = list(items)
        for same in positions.values():
            found = sorted(rank for i in same for rank in _ranks(chosen[i]))
            ranks = {found[round(q)] for q in np.linspace(0, len(found) - 1, buckets - spare)} if found else set()
            smallest = min((rank for i in same for rank in _ranks(items[i])), default=None)
            if smallest is not None and len(ranks) < buckets:
                ranks.add(smallest)
            for i in same:
                allowed[i] = _within(items[i], ranks)
        again = best(allowed, room)
        if again is not None:
            return again
    return None


def _ranks(item: Item) -> list[int]:
    return [form.rank for choice in item.choices for form in choice.forms if form.rank is not None]


def _within(item: Item, ranks: Collection[int]) -> Item:
    """A linear with these ranks, or dense."""
    forms = [choice.forms[0] for choice in item.choices]
    return item.only([i for i, form in enumerate(forms) if form.rank is None or form.rank in ranks])
