"""What a plan chooses from: for every item, a linear, an MLP or an attention, its choices and their prices."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from vitlr.decomposition.spectra import Narrowing, Spectra
from vitlr.measuring.cost import Cost
from vitlr.planning.knapsack import Array, Prices
from vitlr.planning.options import Planning

FACTORED = 16  # so many widths of an MLP are offered with ranks as well: each takes a solve of its second linear


class Choice(NamedTuple):
    """What may become of an item; the bits of its weights would stand here too, with a cost and a loss of their own."""

    width: int | None  # of an MLP or attention; a linear alone has none
    ranks: tuple[int | None, ...]  # of each of its linears; None stays dense


@dataclass(frozen=True)
class Item:
    """An MLP or attention with its linears, or a linear outside of any, and what each choice costs and loses."""

    linears: tuple[str, ...]
    narrowing: Narrowing | None
    choices: list[Choice]
    prices: Prices

    def only(self, indices: Collection[int] | Array) -> Item:
        """The same with these choices alone."""
        picked = np.array([*indices], dtype=int)
        prices = Prices(self.prices.cost[picked], self.prices.loss[picked])
        return replace(self, choices=[self.choices[i] for i in picked], prices=prices)


@dataclass(frozen=True)
class Sizes:
    """What allocation must know of the model beside the spectra: its totals, tokens per image, bytes per weight."""

    total: Cost
    tokens: Mapping[str, float]
    itemsize: Mapping[str, int]
    has_bias: Mapping[str, bool]


@dataclass(frozen=True)
class Offers:
    """Makes items: which choices there are, what each costs in the budget's quantity, and what it loses."""

    spectra: Spectra
    sizes: Sizes
    quantity: str
    options: Planning
    wanted: Collection[str]

    @property
    def method(self) -> str:
        """What is offered: ranks, widths, or both."""
        return self.options.settled or "lowrank"

    def items(self) -> Iterator[Item]:
        """One for every MLP or attention that may get narrower, and for every other linear, in the layers' order."""
        narrowings = () if self.method == "lowrank" else self.spectra.widths.values()
        of = {name: narrowing for narrowing in narrowings for name in (*narrowing.first, narrowing.second)}
        for name in self.spectra.layers:
            narrowing = of.get(name)
            if narrowing is None:
                yield self.linear(name)
            elif name == narrowing.second:
                yield self._narrowed(narrowing)

    def linear(self, name: str, ranks: Collection[int | None] | None = None) -> Item:
        """One linear, with the ranks given or those that make it smaller, and dense."""
        start = Item((), None, [Choice(None, ())], Prices(np.zeros(1), np.zeros(1)))
        if ranks is None:
            factored = self.method != "widths" and name in self.wanted
            ranks = [*(self.ranks(*self.shape(None, name, None)) if factored else []), None]
        return self._extended(start, name, ranks)

    def _narrowed(self, narrowing: Narrowing) -> Item:
        """An MLP or attention: every width alone, and some of them, evenly spread, with ranks; what is worth having."""
        linears = (*narrowing.first, narrowing.second)
        wanted = set(linears) <= set(self.wanted)
        widths = narrowing.choices(self.options.width_step) if wanted else [narrowing.full_width]
        count = min(FACTORED, len(widths)) if narrowing.factored else 0
        ranked = {widths[round(i)] for i in np.linspace(0, len(widths) - 1, count)} | {narrowing.full_width}
        parts = [self._at_width(narrowing, width, self.method == "joint" and width in ranked) for width in widths]
        prices = Prices(*(np.concatenate([getattr(part.prices, key) for part in parts]) for key in ("cost", "loss")))
        whole = Item(linears, narrowing, [choice for part in parts for choice in part.choices], prices)
        return whole.only(worth_having(prices))

    def _at_width(self, narrowing: Narrowing, width: int, ranked: bool) -> Item:
        """The choices of ranks at one width."""
        cost, loss = narrowing.extra(width, self.quantity), self.width_loss(narrowing, width)
        item = Item((), narrowing, [Choice(width, ())], Prices(np.full(1, cost), np.full(1, loss)))
        for name in (*narrowing.first, narrowing.second):
            factored = self.ranks(*self.shape(narrowing, name, width)) if ranked and name in self.wanted else []
            item = self._extended(item, name, [*factored, None])
            item = item.only(worth_having(item.prices))
        return item

    def _extended(self, item: Item, name: str, ranks: Collection[int | None]) -> Item:
        """An item with one more linear: each of its choices with each of these ranks."""
        width = item.choices[0].width
        cost = np.array([self.cost(item.narrowing, name, width, rank) for rank in ranks])
        errors = self.errors(item.narrowing, name, width) if any(rank is not None for rank in ranks) else None
        loss = np.array([0.0 if rank is None or errors is None else float(errors[rank]) for rank in ranks])
        return Item(
            (*item.linears, name),
            item.narrowing,
            [Choice(width, (*choice.ranks, rank)) for choice in item.choices for rank in ranks],
            Prices((item.prices.cost[:, None] + cost).ravel(), (item.prices.loss[:, None] + loss).ravel()),
        )

    def dense(self, item: Item) -> float:
        """Cost of an item with nothing changed."""
        full = None if item.narrowing is None else item.narrowing.full_width
        return sum(self.cost(item.narrowing, name, full, None) for name in item.linears)

    def cost(self, narrowing: Narrowing | None, name: str, width: int | None, rank: int | None) -> float:
        """Of a linear's weights, and of its bias where that is not what it was."""
        N, K = self.shape(narrowing, name, width)
        weights = N * K if rank is None else rank * (N + K)
        return (weights + self.bias(narrowing, name, N, rank)) * self.unit(name)

    def bias(self, narrowing: Narrowing | None, name: str, N: int, rank: int | None) -> int:
        """Entries of a bias that shrinks with the width, or that a centred rank brings; 0 where it stays as it is."""
        if self.quantity == "macs":
            return 0
        if self.sizes.has_bias[name]:
            return N * (narrowing is not None and (name != narrowing.second or narrowing.trims_last))
        return N * (self.spectra.centred and rank is not None)

    def unit(self, name: str) -> float:
        """Cost of one weight of a layer."""
        sizes = self.sizes
        return {"params": 1.0, "macs": sizes.tokens[name], "bytes": float(sizes.itemsize[name])}[self.quantity]

    def shape(self, narrowing: Narrowing | None, name: str, width: int | None) -> tuple[int, int]:
        """(N, K) of a layer where its MLP or attention has this width."""
        spectrum = self.spectra.layers[name]
        full = spectrum.out_features, spectrum.in_features
        return full if narrowing is None or width is None else narrowing.shape(name, full, width)

    def errors(self, narrowing: Narrowing | None, name: str, width: int | None) -> Tensor:
        """Loss of every rank. A narrower first linear keeps rows of the dense one's factors, and its losses."""
        errors = None if narrowing is None or width is None else narrowing.rank_errors(name, width)
        return self.spectra.layers[name].errors() if errors is None else errors

    def width_loss(self, narrowing: Narrowing, width: int) -> float:
        """Of a width alone."""
        return self.options.width_scale * float(narrowing.errors[width])

    def ranks(self, N: int, K: int) -> list[int]:
        """Multiples of the step, from the least one, at which two factors are smaller than the matrix."""
        step = self.options.rank_step
        first = -(-self.options.min_rank // step) * step
        return [r for r in range(first, min(N, K) + 1, step) if r * (N + K) < N * K]


def worth_having(prices: Prices) -> Array:
    """Indices of the choices that no other one beats in both cost and loss, the cheapest first."""
    order = np.lexsort((prices.loss, prices.cost))
    least = np.minimum.accumulate(prices.loss[order])
    better = np.concatenate([[True], prices.loss[order][1:] < least[:-1]])
    return order[better]
