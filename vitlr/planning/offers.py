"""The offers: which choices every part of a model has, what each costs in the budget's quantity, and what it loses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vitlr.decomposition.spectra import Narrowing, Spectra
from vitlr.measuring.cost import Cost
from vitlr.planning.choices import Choice, Item
from vitlr.planning.knapsack import Array, Prices, worth_having
from vitlr.planning.options import Planning

FACTORED = 16  # so many widths of an MLP are offered with ranks as well: each takes a solve of its second linear


@dataclass(frozen=True)
class Sizes:
    """What allocation must know of the model beside the spectra: its totals, tokens per image, bytes per weight."""

    total: Cost
    tokens: Mapping[str, float]
    itemsize: Mapping[str, int]
    has_bias: Mapping[str, bool]
    rest: int = 0  # bytes that all else takes where weights are rounded


@dataclass(frozen=True)
class Offers:
    """Makes the items that a plan chooses from, of what `spectra` hold, for a budget of `quantity`.

    `wanted` are the layers that may change.
    """

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
        narrowings = () if self.method in ("lowrank", "bits") else self.spectra.widths.values()
        of = {name: narrowing for narrowing in narrowings for name in (*narrowing.first, narrowing.second)}
        for name in self.spectra.layers:
            narrowing = of.get(name)
            if narrowing is None:
                yield self.rounded(name) if self.method == "bits" else self.linear(name)
            elif name == narrowing.second:
                yield self._narrowed(narrowing)

    def linear(self, name: str, ranks: Sequence[int | None] | None = None) -> Item:
        """One linear, with the ranks given or those that make it smaller, and dense."""
        start = Item((), None, [Choice(None, ())], Prices(np.zeros(1), np.zeros(1)))
        if ranks is None:
            factored = self.method != "widths" and name in self.wanted
            ranks = [*(self.ranks(*self.shape(None, name, None)) if factored else []), None]
        return self._extended(start, name, ranks)

    def rounded(self, name: str) -> Item:
        """One linear at every level, and left as it is."""
        ladder = self.spectra.roundings[name].ladder if name in self.wanted else {}
        left = self.cost(None, name, self.shape(None, name, None), None)
        cost, loss = np.array([*ladder.values(), (left, 0.0)]).T
        item = Item((name,), None, [Choice(None, (None,), level) for level in (*ladder, None)], Prices(cost, loss))
        return item.only(worth_having(item.prices))

    def outside(self, items: Collection[Item]) -> float:
        """What lies outside of all items: as it is, or as it will be where weights are rounded."""
        if self.method == "bits":
            return self.sizes.rest
        return float(getattr(self.sizes.total, self.quantity)) - sum(self.dense(item) for item in items)

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
        return item

    def _extended(self, item: Item, name: str, ranks: Sequence[int | None]) -> Item:
        """An item with one more linear: each of its choices with each of these ranks, as far as it is worth having.

        A linear alone keeps all of them: some choosers want other ranks than the best.
        """
        width = item.choices[0].width
        shape, errors = self.shape(item.narrowing, name, width), self.errors(item.narrowing, name, width, ranks)
        cost = np.array([self.cost(item.narrowing, name, shape, rank) for rank in ranks])
        loss = np.array([0.0 if rank is None else errors[rank] for rank in ranks])
        prices = Prices((item.prices.cost[:, None] + cost).ravel(), (item.prices.loss[:, None] + loss).ravel())
        kept = np.arange(len(prices.cost)) if item.narrowing is None else worth_having(prices)
        pairs = [divmod(int(index), len(ranks)) for index in kept]
        choices = [Choice(width, (*item.choices[before].ranks, ranks[rank])) for before, rank in pairs]
        return Item((*item.linears, name), item.narrowing, choices, Prices(prices.cost[kept], prices.loss[kept]))

    def dense(self, item: Item) -> float:
        """Cost of an item with nothing changed."""
        return sum(self.cost(item.narrowing, name, self.shape(None, name, None), None) for name in item.linears)

    def cost(self, narrowing: Narrowing | None, name: str, shape: tuple[int, int], rank: int | None) -> float:
        """Of a linear's weights at the shape (N, K), and of its bias where that is not what it was."""
        N, K = shape
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

    def errors(self, narrowing: Narrowing | None, name: str, width: int | None, ranks: Sequence[int | None]) -> Array:
        """Loss of every rank, where one is asked for. A narrower first linear keeps rows of the dense one's factors."""
        if all(rank is None for rank in ranks):
            return np.zeros(0)
        own = None if narrowing is None or width is None else narrowing.rank_errors(name, width)
        return (self.spectra.layers[name].errors() if own is None else own).cpu().numpy()

    def width_loss(self, narrowing: Narrowing, width: int) -> float:
        """Of a width alone."""
        return self.options.width_scale * float(narrowing.errors[width])

    def ranks(self, N: int, K: int) -> list[int]:
        """Multiples of the step, from the least one, at which two factors are smaller than the matrix."""
        step = self.options.rank_step
        first = -(-self.options.min_rank // step) * step
        return [r for r in range(first, min(N, K) + 1, step) if r * (N + K) < N * K]
