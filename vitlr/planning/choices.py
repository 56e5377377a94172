"""What a plan chooses from: items, each a linear, an MLP or an attention, with the choices that it has."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from vitlr.decomposition.spectra import Narrowing
from vitlr.planning.knapsack import Array, Prices, choose


class Form(NamedTuple):
    """What may become of one linear's weight."""

    rank: int | None = None  # None stays dense
    level: int | None = None  # that it is rounded to; None leaves its numbers as they are
    int8: bool = False  # whether it multiplies bytes


DENSE = Form()


class Choice(NamedTuple):
    """What may become of an item."""

    width: int | None  # of an MLP or attention; a linear alone has none
    forms: tuple[Form, ...]  # of each of its linears
    bits: int | None = None  # a row of a matrix beside the linears


@dataclass(frozen=True)
class Item:
    """An MLP or attention with its linears, or a linear outside of any, and what each choice costs and loses.

    One without linears is a `matrix` beside them all, which bits may be chosen for.
    """

    linears: tuple[str, ...]
    narrowing: Narrowing | None
    choices: list[Choice]
    prices: Prices
    matrix: str = ""

    def only(self, indices: Collection[int] | Array) -> Item:
        """The same with these choices alone."""
        picked = np.array([*indices], dtype=int)
        prices = Prices(self.prices.cost[picked], self.prices.loss[picked])
        return replace(self, choices=[self.choices[i] for i in picked], prices=prices)


def best(items: Sequence[Item], room: float) -> list[Item] | None:
    """Every item with the one choice that the knapsack takes; None where nothing fits."""
    picked = choose([item.prices for item in items], room)
    return None if picked is None else [item.only([index]) for item, index in zip(items, picked, strict=True)]
