"""The multiple-choice knapsack: one choice per item, the least total loss under one total cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Prices:
    """The choices of one item: `cost[i]` ascending, `loss[i]`."""

    cost: Array
    loss: Array


def worth_having(prices: Prices) -> Array:
    """Indices of the choices that no other one beats in both cost and loss, the cheapest first."""
    order = np.lexsort((prices.loss, prices.cost))
    least = np.minimum.accumulate(prices.loss[order])
    better = np.concatenate([[True], prices.loss[order][1:] < least[:-1]])
    return order[better]


def choose(items: Sequence[Prices], limit: float) -> list[int] | None:
    """The choice of every item with the least total loss at a total cost of at most `limit`; None if none fits.

    Lagrange relaxation (`argmin loss + μ cost` for each item, μ by bisection) walks the lower convex hulls exactly;
    what the hulls leave over is filled by single upgrades, the best loss saved per cost first. Ties go to the cheaper
    choice and the earlier item, so equal input gives equal output.
    """
    cheapest = [int(np.argmin(item.cost)) for item in items]
    if _total(items, cheapest) > limit:
        return None
    low, high = 0.0, 1.0
    free = _relaxed(items, 0.0)
    if _total(items, free) <= limit:
        return free
    while _total(items, _relaxed(items, high)) > limit:
        low, high = high, high * 4
        if not np.isfinite(high):
            return cheapest
    for _ in range(200):
        middle = (low + high) / 2 if low == 0 or high / low < 4 else float(np.sqrt(low) * np.sqrt(high))
        if middle in (low, high):
            break
        if _total(items, _relaxed(items, middle)) > limit:
            low = middle
        else:
            high = middle
    return _fill(items, _relaxed(items, high), limit)


def _relaxed(items: Sequence[Prices], price: float) -> list[int]:
    return [int(np.argmin(item.loss + price * item.cost)) for item in items]


def _total(items: Sequence[Prices], chosen: Sequence[int]) -> float:
    return float(sum(item.cost[i] for item, i in zip(items, chosen, strict=True)))


def _fill(items: Sequence[Prices], chosen: list[int], limit: float) -> list[int]:
    """Spend what is left on the upgrade that saves most per cost, until none fits."""
    left = limit - _total(items, chosen)
    while True:
        best, best_rate = None, 0.0
        for index, (item, now) in enumerate(zip(items, chosen, strict=True)):
            extra, saved = item.cost - item.cost[now], item.loss[now] - item.loss
            usable = (saved > 0) & (extra <= left)
            if not usable.any():
                continue
            with np.errstate(over="ignore"):  # an upgrade that costs nothing is worth any price
                rate = np.where(usable, saved / np.maximum(extra, np.finfo(float).tiny), 0.0)
            option = int(np.argmax(rate))
            if rate[option] > best_rate:
                best, best_rate = (index, option), float(rate[option])
        if best is None:
            return chosen
        index, option = best
        left -= items[index].cost[option] - items[index].cost[chosen[index]]
        chosen[index] = option
