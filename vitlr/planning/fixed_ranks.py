"""Ranks that no knapsack chooses: the same share for every layer, or as they are given."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

from vitlr.errors import InputError
from vitlr.planning.choices import Form, Item
from vitlr.planning.offers import Offers


def uniform(offers: Offers, items: Sequence[Item], room: float) -> list[Item] | None:
    """The largest share ρ such that rank ≤ ρ N K / (N + K) in every layer fits; a rank at break-even means dense.

    Every item with the one choice taken; None where nothing fits.
    """
    sizes = [_sizes(offers, item) for item in items]

    def at(share: float) -> list[Item]:
        chosen = []
        for item, (weights, own) in zip(items, sizes, strict=True):
            fitting = [index for index, kept in enumerate(own) if kept <= share * weights]
            dense = share >= 1 or not own
            chosen.append(item.only([len(own) if dense else fitting[-1] if fitting else 0]))
        return chosen

    def fits(chosen: Sequence[Item]) -> bool:
        return sum(float(item.prices.cost[0]) for item in chosen) <= room

    if fits(at(1.0)):
        return at(1.0)
    steps = sorted({kept / weights for weights, own in sizes for kept in own})
    if not steps or not fits(at(0.0)):
        return None
    low, high = -1, len(steps)  # at(steps[low]) fits, at(steps[high]) does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(at(steps[middle])) else (low, middle)
    return at(steps[low] if low >= 0 else 0.0)


def by_hand(offers: Offers, ranks: Mapping[str, int]) -> list[Item]:
    """Every layer with the rank given, or dense; `InputError` for ranks that a layer cannot have."""
    layers = offers.spectra.layers
    for name, rank in ranks.items():
        if name not in layers:
            raise InputError(
                f"ranks= names {name!r}, which is no compressible layer; the first is {next(iter(layers))!r}"
            )
        limit = layers[name].max_rank
        whole = hasattr(rank, "__index__") and not isinstance(rank, bool)  # numpy's too
        if not whole or not 1 <= operator.index(rank) <= limit:
            raise InputError(f"layer {name}: rank {rank!r}, expected a whole number from 1 to {limit}")
    return [offers.linear(name, [Form(operator.index(ranks[name]) if name in ranks else None)]) for name in layers]


def _sizes(offers: Offers, item: Item) -> tuple[int, list[int]]:
    """How many weights a linear has, and what is kept of them at its ranks, ascending; dense comes after those."""
    (name,) = item.linears
    N, K = offers.shape(None, name, None)
    return N * K, [form.rank * (N + K) for choice in item.choices for form in choice.forms if form.rank is not None]
