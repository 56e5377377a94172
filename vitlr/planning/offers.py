"""The offers: which choices every part of a model has, what each costs in the budget's quantity, and what it loses."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from vitlr.decomposition.ranked_widths import spread
from vitlr.decomposition.spectra import Narrowing
from vitlr.planning.choices import Choice, Form, Item
from vitlr.planning.forms import Forms
from vitlr.planning.knapsack import Prices, worth_having
from vitlr.planning.options import NARROWING


class Offers(Forms):
    """Makes the items that a plan chooses from."""

    def items(self) -> Iterator[Item]:
        """One for every MLP or attention that may get narrower, and for every other linear, in the layers' order."""
        narrowings = self.spectra.widths.values() if self.method in NARROWING else ()
        of = {name: narrowing for narrowing in narrowings for name in (*narrowing.first, narrowing.second)}
        for name in self.spectra.layers:
            narrowing = of.get(name)
            if narrowing is None:
                yield self.linear(name)
            elif name == narrowing.second:
                yield self._narrowed(narrowing)

    def matrices(self) -> list[Item]:
        """One for every matrix beside the linears whose bits may be chosen, where weights are rounded within bytes."""
        found = []
        for name, known in self.sizes.matrices.items() if self.rounds else ():
            cost, loss = (np.array(each) for each in zip(*known.values(), strict=True))
            found.append(Item((), None, [Choice(None, (), bits) for bits in known], Prices(cost, loss), name))
        return found

    def linear(self, name: str, forms: Sequence[Form] | None = None) -> Item:
        """One linear, with the forms given or those that make it smaller, and as it is."""
        start = Item((), None, [Choice(None, ())], Prices(np.zeros(1), np.zeros(1)))
        if forms is None:
            forms = self.of(None, name, None, factored=self.method not in ("widths", "bits"))
        return self._extended(start, name, forms)

    def bits_alone(self, item: Item) -> Item:
        """The same part of the model with what neither narrows it nor gives it ranks; a matrix with the most bits."""
        if item.matrix:
            return item.only([0])
        if item.narrowing is not None:
            return self._at_width(item.narrowing, item.narrowing.full_width, ranked=False)
        (name,) = item.linears
        return self.linear(name, self.of(None, name, None, factored=False))

    def rounded(self, item: Item) -> Item:
        """An item that has one choice, with a level for every linear that may change: bits on top of another budget."""
        width, forms, _ = item.choices[0]
        pairs = zip(item.linears, forms, strict=True)
        found = tuple(
            form._replace(level=self.levels(item.narrowing, name, width, form.rank)[0]) if name in self.wanted else form
            for name, form in pairs
        )
        return replace(item, choices=[Choice(width, found)])

    @property
    def whole(self) -> float:
        """The dense model's total."""
        return float(getattr(self.sizes.total, self.quantity))

    def said(self, amount: float) -> str:
        """An amount in the message of a budget that is out of reach."""
        return f"{amount:,.0f} {self.quantity}"

    def outside(self, items: Collection[Item]) -> float:
        """What lies outside of all items: as it is, or as it will be where weights are rounded."""
        if self.rounds:
            return self.sizes.rest
        return self.whole - sum(self.dense(item) for item in items)

    def dense(self, item: Item) -> float:
        """Cost of an item with nothing changed."""
        return sum(self.cost(item.narrowing, name, self.shape(None, name, None), None) for name in item.linears)

    def width_loss(self, narrowing: Narrowing, width: int) -> float:
        """Of a width alone."""
        scale = self.options.width_scale * self.correction(narrowing, narrowing.second)
        return scale * float(narrowing.errors[width])

    def _narrowed(self, narrowing: Narrowing) -> Item:
        """An MLP or attention: every width alone, and some of them, evenly spread, with ranks; what is worth having."""
        linears = (*narrowing.first, narrowing.second)
        wanted = set(linears) <= set(self.wanted)
        widths = narrowing.choices(self.options.width_step) if wanted else [narrowing.full_width]
        ranked = {*(spread(widths) if narrowing.factored else ()), narrowing.full_width}
        if self.method not in ("joint", "mix"):
            ranked = set()
        elif self.rounds:  # what it gains beyond is little, and takes a solve a width
            ranked = {narrowing.full_width}
        parts = [self._at_width(narrowing, width, width in ranked) for width in widths]
        prices = Prices(*(np.concatenate([getattr(part.prices, key) for part in parts]) for key in ("cost", "loss")))
        whole = Item(linears, narrowing, [choice for part in parts for choice in part.choices], prices)
        return whole.only(worth_having(prices))

    def _at_width(self, narrowing: Narrowing, width: int, ranked: bool) -> Item:
        """The choices of forms at one width."""
        cost, loss = narrowing.extra(width, self.quantity), self.width_loss(narrowing, width)
        item = Item((), narrowing, [Choice(width, ())], Prices(np.full(1, cost), np.full(1, loss)))
        for name in (*narrowing.first, narrowing.second):
            forms = self.of(narrowing, name, width, ranked)
            if not forms:  # none of the bits asked for: the steps of so few weights take more
                return item.only([])
            item = self._extended(item, name, forms)
        return item

    def _extended(self, item: Item, name: str, forms: Sequence[Form]) -> Item:
        """An item with one more linear: each of its choices with each of these forms, as far as it is worth having.

        A linear alone that is not rounded keeps all of them: some choosers want other ranks than the best.
        """
        width, own = item.choices[0].width, self.prices(item.narrowing, name, item.choices[0].width, forms)
        sums = (getattr(item.prices, key)[:, None] + getattr(own, key) for key in ("cost", "loss"))
        prices = Prices(*(both.ravel() for both in sums))
        alone = item.narrowing is None and not self.rounds
        kept = np.arange(len(prices.cost)) if alone else worth_having(prices)
        pairs = [divmod(int(index), len(forms)) for index in kept]
        choices = [Choice(width, (*item.choices[before].forms, forms[form])) for before, form in pairs]
        return Item((*item.linears, name), item.narrowing, choices, Prices(prices.cost[kept], prices.loss[kept]))
