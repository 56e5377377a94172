"""Offers under a budget of milliseconds: every form also of bytes, priced by what it takes on this machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vitlr.decomposition.spectra import Narrowing
from vitlr.measuring import times_file
from vitlr.planning.choices import DENSE, Choice, Form, Item
from vitlr.planning.knapsack import Prices
from vitlr.planning.latency import Latency
from vitlr.planning.offers import Offers
from vitlr.planning.pace import Pace

FACTORS = 2e-4  # of what a rank is worth: lost where factors are bytes; 0.6e-4 to 3.4e-4 by layer of a ViT-Ti


@dataclass(frozen=True)
class TimedOffers(Offers):
    """Offers whose costs are milliseconds a batch; `bytes_loss` is what dense linears lose that multiply bytes."""

    pace: Pace
    bytes_loss: Mapping[str, float]

    @property
    def whole(self) -> float:
        return self.pace.times.whole

    def said(self, amount: float) -> str:
        return f"{amount:.4g} ms"

    def of(self, narrowing: Narrowing | None, name: str, width: int | None, factored: bool) -> list[Form]:
        floats = super().of(narrowing, name, width, factored)
        may = name in self.wanted and name in self.bytes_loss
        of_bytes = [form._replace(int8=True) for form in floats if may]
        if narrowing is None or narrowing.kind != "query_keys" or width in (None, narrowing.full_width):
            return [*of_bytes, *floats]
        return [] if narrowing.first else of_bytes  # a block of bytes leaves out what is gone, all else writes zeros

    def prices(self, narrowing: Narrowing | None, name: str, width: int | None, forms: Sequence[Form]) -> Prices:
        errors = self.errors(narrowing, name, width, forms)
        cost = np.array([self.ms(narrowing, name, width, form) for form in forms])
        loss = np.array([0.0 if form.rank is None else errors[form.rank] for form in forms])
        for i, form in enumerate(forms):
            loss[i] += self._of_bytes(narrowing, name, width, form, errors) if form.int8 else 0.0
        return Prices(cost, self.correction(narrowing, name) * loss)

    def ms(self, narrowing: Narrowing | None, name: str, width: int | None, form: Form) -> float:
        """Milliseconds of a linear in this form."""
        return self.pace.ms(name, self.shape(narrowing, name, width), width, form.rank, form.int8)

    def outside(self, items: Collection[Item]) -> float:
        """What the dense model takes besides its linears: norms, softmax, products of attention, the head."""
        return max(self.whole - sum(self.dense(item) for item in items), 0.0)

    def dense(self, item: Item) -> float:
        return sum(self.ms(item.narrowing, name, None, DENSE) for name in item.linears)

    def promised(self, chosen: Collection[Item]) -> Latency:
        """What a plan of items with one choice each is going to take."""
        times = self.pace.times
        promised = self.outside(chosen) + sum(float(item.prices.cost[0]) for item in chosen)
        machine = times_file.machine(times.threads)
        how = (times.batch_size, times.threads, times.dtype, machine)
        return Latency(*how, round(times.whole, 4), round(promised, 4))

    def slower(self, item: Item, name: str, form: Form) -> str | None:
        """What else was offered to a linear that takes no less time than what it got: "low rank", "int8" or neither."""
        width = item.choices[0].width
        own = self.ms(item.narrowing, name, width, form)
        others = self.of(item.narrowing, name, width, factored=self.method != "widths")
        ranked = [other for other in others if other.rank is not None and other.int8 == form.int8]
        if form.rank is None and ranked and all(self.ms(item.narrowing, name, width, o) >= own for o in ranked):
            return "low rank"
        other = form._replace(int8=not form.int8)
        return "int8" if other.int8 and other in others and self.ms(item.narrowing, name, width, other) >= own else None

    def _of_bytes(
        self, narrowing: Narrowing | None, name: str, width: int | None, form: Form, errors: np.ndarray
    ) -> float:
        """What bytes lose: in proportion to the weights left, and for every rank a share of what it is worth."""
        (N, K), spectrum = self.shape(narrowing, name, width), self.spectra.layers[name]
        lost = self.bytes_loss[name] * N * K / (spectrum.out_features * spectrum.in_features)
        return lost if form.rank is None else lost + FACTORS * float(errors[0] - errors[form.rank])

    def _at_width(self, narrowing: Narrowing, width: int, ranked: bool) -> Item:
        """The choices of forms at one width; an MLP that is one operation is of floats or of bytes as a whole."""
        if not self.pace.is_half(narrowing.second):
            return super()._at_width(narrowing, width, ranked)
        linears = (*narrowing.first, narrowing.second)
        parts = []
        for int8 in (True, False):
            start = Prices(np.zeros(1), np.full(1, self.width_loss(narrowing, width)))
            item = Item((), narrowing, [Choice(width, ())], start)
            for name in linears:
                forms = [form for form in self.of(narrowing, name, width, ranked) if form.int8 == int8]
                if not forms:
                    break
                item = self._extended(item, name, forms)
            else:
                parts.append(item)
        prices = Prices(*(np.concatenate([getattr(part.prices, key) for part in parts]) for key in ("cost", "loss")))
        return Item(linears, narrowing, [choice for part in parts for choice in part.choices], prices)
