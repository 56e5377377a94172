"""What the joint allocation chooses from: widths and ranks of an MLP or attention, or ranks of one linear."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vitlr.decomposition.mlp_widths import WidthSpectrum
from vitlr.decomposition.spectra import Narrowing, Spectra
from vitlr.planning.allocation import Sizes
from vitlr.planning.knapsack import Array, Options

FACTORED = 16  # so many widths of an MLP are offered with ranks as well: each takes a solve of its second linear


@dataclass(frozen=True)
class Item:
    """The choices of an MLP or an attention, or of one linear outside of any: costs and losses of `(width, ranks)`."""

    linears: tuple[str, ...]
    widths: Narrowing | None
    choices: list[tuple[int | None, tuple[int | None, ...]]]
    options: Options

    def only(self, indices: Array) -> Item:
        return Item(
            self.linears,
            self.widths,
            [self.choices[i] for i in indices],
            Options(self.options.cost[indices], self.options.loss[indices]),
        )


@dataclass(frozen=True)
class Maker:
    """Builds items: what every choice costs in the budget's quantity, and loses."""

    spectra: Spectra
    sizes: Sizes
    quantity: str
    rank_step: int
    min_rank: int
    width_step: int
    width_scale: float

    def unit(self, name: str) -> float:
        """Cost of one weight of a layer."""
        itemsize = float(self.sizes.itemsize[name])
        return {"params": 1.0, "macs": self.sizes.tokens[name], "bytes": itemsize}[self.quantity]

    def bias(self, item_linears: Sequence[str], mlp: Narrowing | None, name: str, N: int) -> float:
        """Cost of the bias of a linear whose outputs a narrower width takes; that of another never changes."""
        trimmed = name != item_linears[-1] or (mlp is not None and mlp.trims_last)
        counts = trimmed and self.sizes.has_bias[name] and self.quantity != "macs"
        return self.unit(name) * N * counts

    def shape(self, mlp: Narrowing | None, name: str, width: int | None) -> tuple[int, int]:
        """(N, K) of a layer where its MLP has this width."""
        spectrum = self.spectra.layers[name]
        N, K = spectrum.out_features, spectrum.in_features
        if mlp is None or width is None:
            return N, K
        return mlp.shape(name, (N, K), width)

    def dense(self, item: Item) -> float:
        """Cost of an item with nothing changed."""
        shapes = [(name, *self.shape(None, name, None)) for name in item.linears]
        return sum(self.unit(name) * N * K + self.bias(item.linears, item.widths, name, N) for name, N, K in shapes)

    def item(self, linears: tuple[str, ...], mlp: Narrowing | None, method: str, wanted: Collection[str]) -> Item:
        """All choices worth having."""
        ranked = method == "joint" or (method == "hybrid" and mlp is None)
        if mlp is None:
            return self._at_width(linears, None, None, ranked, wanted)
        widths = mlp.choices(self.width_step) if set(linears) <= set(wanted) else [mlp.full_width]
        # Every width alone, and some of them, evenly spread, with ranks.
        count = min(FACTORED, len(widths)) if mlp.factored else 0
        few = {widths[round(i)] for i in np.linspace(0, len(widths) - 1, count)}
        few.add(mlp.full_width)
        parts = [self._at_width(linears, mlp, width, ranked and width in few, wanted) for width in widths]
        choices = [choice for part in parts for choice in part.choices]
        cost = np.concatenate([part.options.cost for part in parts])
        loss = np.concatenate([part.options.loss for part in parts])
        return Item(linears, mlp, choices, Options(cost, loss)).only(worth_having(cost, loss))

    def _at_width(
        self,
        linears: tuple[str, ...],
        mlp: Narrowing | None,
        width: int | None,
        ranked: bool,
        wanted: Collection[str],
    ) -> Item:
        """The choices of ranks at one width."""
        cost, loss = np.zeros(1), np.zeros(1)
        if mlp is not None and width is not None:
            loss = loss + self.width_errors(mlp, width)
            cost = cost + mlp.extra(width, self.quantity)
        choices: list[tuple[int | None, ...]] = [()]
        for name in linears:
            N, K = self.shape(mlp, name, width)
            ranks: list[int | None] = [*self._ranks(N, K), None] if ranked and name in wanted else [None]
            errors = self.errors(mlp, name, width) if len(ranks) > 1 else None
            own = np.array([N * K if r is None else r * (N + K) for r in ranks]) * self.unit(name)
            own = own + self.bias(linears, mlp, name, N)
            lost = np.array([0.0 if r is None or errors is None else float(errors[r]) for r in ranks])
            cost, loss = (cost[:, None] + own).ravel(), (loss[:, None] + lost).ravel()
            choices = [(*before, r) for before, r in itertools.product(choices, ranks)]
            best = worth_having(cost, loss)
            cost, loss, choices = cost[best], loss[best], [choices[i] for i in best]
        return Item(linears, mlp, [(width, ranks) for ranks in choices], Options(cost, loss))

    def width_errors(self, mlp: Narrowing, width: int) -> float:
        """Loss of a width alone."""
        return self.width_scale * float(mlp.errors[width])

    def errors(self, mlp: Narrowing | None, name: str, width: int | None) -> Tensor:
        """Loss of every rank. A narrower first linear keeps rows of the dense one's factors, and its losses."""
        if isinstance(mlp, WidthSpectrum) and width is not None and name == mlp.second and width < mlp.full_width:
            return mlp.second_errors(width)
        return self.spectra.layers[name].errors()

    def _ranks(self, N: int, K: int) -> list[int]:
        first = -(-self.min_rank // self.rank_step) * self.rank_step
        return [r for r in range(first, min(N, K) + 1, self.rank_step) if r * (N + K) < N * K]


def worth_having(cost: Array, loss: Array) -> Array:
    """Indices of the options that no other one beats in both cost and loss, the cheapest first."""
    order = np.lexsort((loss, cost))
    least = np.minimum.accumulate(loss[order])
    better = np.concatenate([[True], loss[order][1:] < least[:-1]])
    return order[better]
