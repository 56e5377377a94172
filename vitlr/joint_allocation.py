"""Joint allocation: ranks and hidden widths as options of one knapsack under one budget.

An MLP is one item: its options are a width and a rank, or dense, for each of its linears as they are at that width. Any
other linear is an item of its own. Losses of a width and of the ranks within it add up, since what a compensated width
loses is uncorrelated with what it keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vitlr.allocation import Sizes, check_counts, match_layers
from vitlr.budgets import Budget
from vitlr.errors import InputError
from vitlr.knapsack import Array, Options, choose
from vitlr.plans import METHODS, LayerPlan, Plan, WidthPlan
from vitlr.pruning.widths import WidthSpectrum
from vitlr.spectra import Spectra

FACTORED = 16  # so many widths of an MLP are offered with ranks as well: each takes a solve of its second linear
WIDTH_SCALE = 1.0  # what a predicted loss of widths counts against one of ranks (docs/method.md)


@dataclass(frozen=True)
class _Item:
    """The choices of an MLP, or of one linear outside of any: costs and losses of `(width, ranks)`."""

    linears: tuple[str, ...]
    widths: WidthSpectrum | None
    choices: list[tuple[int | None, tuple[int | None, ...]]]
    options: Options

    def only(self, indices: Array) -> _Item:
        return _Item(
            self.linears,
            self.widths,
            [self.choices[i] for i in indices],
            Options(self.options.cost[indices], self.options.loss[indices]),
        )


def allocate_jointly(
    spectra: Spectra,
    sizes: Sizes,
    budget: Budget | None,
    *,
    method: str = "joint",
    prune_rate: float | None = None,
    rank_step: int = 16,
    min_rank: int = 1,
    width_step: int = 16,
    width_scale: float = WIDTH_SCALE,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Plan:
    """Choose a width for every MLP, and a rank or dense for every layer.

    `method`: "prune" changes widths only; "hybrid" changes widths of MLPs and ranks of everything else
    (arXiv 2203.13444); "joint" offers MLPs every combination. `prune_rate` fixes the share of hidden neurons that goes,
    over all MLPs together ("prune" and "hybrid"; with "prune" it takes the place of a budget). Widths are multiples of
    `width_step`, and at least one step of every MLP stays.

    Raises `InputError` where the budget cannot be reached, saying what can be, and for bad arguments.
    """
    check_options(
        budget,
        method=method,
        prune_rate=prune_rate,
        rank_step=rank_step,
        min_rank=min_rank,
        width_step=width_step,
        width_scale=width_scale,
    )
    wanted = match_layers(list(spectra.layers), include, exclude)
    maker = _Maker(
        spectra, sizes, budget.quantity if budget else "params", rank_step, min_rank, width_step, width_scale
    )
    items = [maker.item(linears, widths, method, wanted) for linears, widths in _groups(spectra)]
    if prune_rate is not None:
        items = _at_rate(items, prune_rate)
    totals = {q: getattr(sizes.total, q) for q in ("params", "macs", "bytes")}
    if budget is None:
        chosen: list[int] | None = [int(np.argmin(item.options.cost)) for item in items]
    else:
        whole = float(totals[budget.quantity])
        outside = whole - sum(maker.dense(item) for item in items)
        chosen = choose([item.options for item in items], budget.limit(whole) - outside)
        if chosen is None:
            least = outside + sum(item.options.cost.min() for item in items)
            raise InputError(
                f"budget {budget} cannot be reached with method={method!r}: the smallest plan keeps "
                f"{least / whole:.2%} ({least:,.0f} of {whole:,.0f} {budget.quantity}); raise the budget, take smaller "
                "steps, or use method='joint'"
            )
    rows, mlps = [], []
    for item, index in zip(items, chosen or [], strict=True):
        width, ranks = item.choices[index]
        if item.widths is not None and width is not None:
            mlps.append(maker.mlp_row(item.widths, width, _why_width(item, width, maker, wanted, prune_rate)))
        rows += maker.layer_rows(item, width, ranks, wanted, method)
    order = {name: index for index, name in enumerate(spectra.layers)}
    rows.sort(key=lambda row: order[row.name])
    saved = maker.saved(rows)
    return Plan(
        budget=str(budget) if budget else f"prune rate {prune_rate:g}",
        objective=spectra.objective,
        centred=False,
        damping=spectra.damping,
        layers=tuple(rows),
        fingerprint=spectra.fingerprint,
        method=method,
        widths=tuple(mlps),
        compensated=all(w.compensated for w in spectra.widths.values()),
        ridge=next((w.ridge for w in spectra.widths.values()), 0.0),
        spectra=spectra,
        **totals,
        **{f"{q}_kept": totals[q] - saved[q] for q in totals},
    )


def check_options(
    budget: Budget | None,
    *,
    method: str,
    prune_rate: float | None = None,
    rank_step: int = 16,
    min_rank: int = 1,
    width_step: int = 16,
    width_scale: float = WIDTH_SCALE,
    uniform: bool = False,
    ranks: object = None,
    rank_buckets: int | None = None,
    centred: bool | None = None,
) -> None:
    """Raise `InputError` for options that no spectra could serve."""
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}")
    if prune_rate is not None:
        if method not in ("prune", "hybrid"):
            raise InputError(f"prune_rate= goes with method='prune' or 'hybrid', not with {method!r}")
        if not 0 < prune_rate < 1:
            raise InputError(f"prune_rate={prune_rate}, expected a share of the hidden neurons between 0 and 1")
        if method == "prune" and budget is not None:
            raise InputError("method='prune' takes a budget or a prune_rate, not both")
    check_counts(rank_step=rank_step, min_rank=min_rank, width_step=width_step)
    if not 0 < width_scale < float("inf"):
        raise InputError(f"width_scale={width_scale}, expected a number above 0")
    if method == "lowrank":
        return
    given = {"uniform=True": uniform, "ranks=": ranks, "rank_buckets=": rank_buckets, "centred=True": centred}
    for option, value in given.items():
        if value:
            raise InputError(f"{option} goes with method='lowrank' only, not with {method!r}")
    if budget is None and not (method == "prune" and prune_rate is not None):
        raise InputError("give a budget such as 'params:60%'")


def _groups(spectra: Spectra) -> list[tuple[tuple[str, ...], WidthSpectrum | None]]:
    """The linears of every MLP together, and all others alone, in the order of the layers."""
    of = {name: mlp for mlp in spectra.widths.values() for name in (*mlp.first, mlp.second)}
    groups: list[tuple[tuple[str, ...], WidthSpectrum | None]] = []
    for name in spectra.layers:
        mlp = of.get(name)
        if mlp is None:
            groups.append(((name,), None))
        elif name == mlp.second:
            groups.append(((*mlp.first, mlp.second), mlp))
    return groups


def _at_rate(items: list[_Item], rate: float) -> list[_Item]:
    """Settle the widths of all MLPs: those at which `rate` of all hidden neurons goes at the least loss."""
    mlps = [item for item in items if item.widths is not None]
    neurons = [np.array([float(width or 0) for width, _ in item.choices]) for item in mlps]
    total = sum(item.widths.full_width for item in mlps if item.widths is not None)
    limit = (1 - rate) * total
    picked = choose([Options(n, item.options.loss) for n, item in zip(neurons, mlps, strict=True)], limit)
    if picked is None:
        least = sum(n.min() for n in neurons)
        raise InputError(
            f"prune_rate={rate:g} cannot be reached: {least:,.0f} of {total:,.0f} hidden neurons must stay at this "
            "width_step, and those of layers left out"
        )
    settled = {id(item): item.only(np.array([index])) for item, index in zip(mlps, picked, strict=True)}
    return [settled.get(id(item), item) for item in items]


@dataclass(frozen=True)
class _Maker:
    """Builds items and rows: what everything costs in the budget's quantity."""

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

    def bias(self, item_linears: Sequence[str], name: str, N: int) -> float:
        """Cost of a first linear's bias, which a narrower width saves; that of a last or lone linear never changes."""
        counts = name != item_linears[-1] and self.sizes.has_bias[name] and self.quantity != "macs"
        return self.unit(name) * N * counts

    def shape(self, mlp: WidthSpectrum | None, name: str, width: int | None) -> tuple[int, int]:
        """(N, K) of a layer where its MLP has this width."""
        spectrum = self.spectra.layers[name]
        N, K = spectrum.out_features, spectrum.in_features
        if mlp is None or width is None:
            return N, K
        return (N, width) if name == mlp.second else (width * (2 if mlp.packed else 1), K)

    def dense(self, item: _Item) -> float:
        """Cost of an item with nothing changed."""
        shapes = [(name, *self.shape(None, name, None)) for name in item.linears]
        return sum(self.unit(name) * N * K + self.bias(item.linears, name, N) for name, N, K in shapes)

    def item(self, linears: tuple[str, ...], mlp: WidthSpectrum | None, method: str, wanted: Collection[str]) -> _Item:
        """All choices worth having."""
        ranked = method == "joint" or (method == "hybrid" and mlp is None)
        if mlp is None:
            return self._at_width(linears, None, None, ranked, wanted)
        widths = self.widths(mlp) if set(linears) <= set(wanted) else [mlp.full_width]
        # Every width alone, and some of them, evenly spread, with ranks.
        few = {widths[round(i)] for i in np.linspace(0, len(widths) - 1, min(FACTORED, len(widths)))}
        few.add(mlp.full_width)
        parts = [self._at_width(linears, mlp, width, ranked and width in few, wanted) for width in widths]
        choices = [choice for part in parts for choice in part.choices]
        cost = np.concatenate([part.options.cost for part in parts])
        loss = np.concatenate([part.options.loss for part in parts])
        return _Item(linears, mlp, choices, Options(cost, loss)).only(_worth_having(cost, loss))

    def widths(self, mlp: WidthSpectrum) -> list[int]:
        """Multiples of the step below the full width, and that."""
        return [*range(self.width_step, mlp.full_width, self.width_step), mlp.full_width]

    def _at_width(
        self,
        linears: tuple[str, ...],
        mlp: WidthSpectrum | None,
        width: int | None,
        ranked: bool,
        wanted: Collection[str],
    ) -> _Item:
        """The choices of ranks at one width."""
        cost, loss = np.zeros(1), np.zeros(1)
        if mlp is not None and width is not None:
            loss = loss + self.width_scale * float(mlp.errors[width])
        choices: list[tuple[int | None, ...]] = [()]
        for name in linears:
            N, K = self.shape(mlp, name, width)
            ranks: list[int | None] = [*self._ranks(N, K), None] if ranked and name in wanted else [None]
            errors = self.errors(mlp, name, width) if len(ranks) > 1 else None
            own = np.array([N * K if r is None else r * (N + K) for r in ranks]) * self.unit(name)
            own = own + self.bias(linears, name, N)
            lost = np.array([0.0 if r is None or errors is None else float(errors[r]) for r in ranks])
            cost, loss = (cost[:, None] + own).ravel(), (loss[:, None] + lost).ravel()
            choices = [(*before, r) for before, r in itertools.product(choices, ranks)]
            best = _worth_having(cost, loss)
            cost, loss, choices = cost[best], loss[best], [choices[i] for i in best]
        return _Item(linears, mlp, [(width, ranks) for ranks in choices], Options(cost, loss))

    def errors(self, mlp: WidthSpectrum | None, name: str, width: int | None) -> Tensor:
        """Loss of every rank. A narrower first linear keeps rows of the dense one's factors, and its losses."""
        if mlp is not None and width is not None and name == mlp.second and width < mlp.full_width:
            return mlp.second_errors(width)
        return self.spectra.layers[name].errors()

    def _ranks(self, N: int, K: int) -> list[int]:
        first = -(-self.min_rank // self.rank_step) * self.rank_step
        return [r for r in range(first, min(N, K) + 1, self.rank_step) if r * (N + K) < N * K]

    def mlp_row(self, mlp: WidthSpectrum, width: int, reason: str) -> WidthPlan:
        return WidthPlan(mlp.name, mlp.full_width, width, self.width_scale * float(mlp.errors[width]), reason)

    def layer_rows(
        self,
        item: _Item,
        width: int | None,
        ranks: Sequence[int | None],
        wanted: Collection[str],
        method: str,
    ) -> list[LayerPlan]:
        rows = []
        for name, rank in zip(item.linears, ranks, strict=True):
            spectrum = self.spectra.layers[name]
            N, K = self.shape(item.widths, name, width)
            error = 0.0 if rank is None else float(self.errors(item.widths, name, width)[rank])
            rows.append(
                LayerPlan(
                    name,
                    spectrum.in_features,
                    spectrum.out_features,
                    rank,
                    self.sizes.tokens[name],
                    error,
                    _why_rank(item, name, rank, wanted, method),
                    kept_in=K if spectrum.in_features != K else None,
                    kept_out=N if spectrum.out_features != N else None,
                )
            )
        return rows

    def saved(self, rows: Sequence[LayerPlan]) -> dict[str, int]:
        """What the whole plan saves, in every quantity."""
        saved = {"params": 0, "macs": 0, "bytes": 0}
        for row in rows:
            weights = row.in_features * row.out_features
            bias = row.out_features - row.shape[0] if self.sizes.has_bias[row.name] else 0
            saved["params"] += weights - row.params + bias
            saved["macs"] += round(weights * row.tokens) - row.macs
            saved["bytes"] += (weights - row.params + bias) * self.sizes.itemsize[row.name]
        return saved


def _worth_having(cost: Array, loss: Array) -> Array:
    """Indices of the options that no other one beats in both cost and loss, the cheapest first."""
    order = np.lexsort((loss, cost))
    least = np.minimum.accumulate(loss[order])
    better = np.concatenate([[True], loss[order][1:] < least[:-1]])
    return order[better]


def _why_width(item: _Item, width: int, maker: _Maker, wanted: Collection[str], rate: float | None) -> str:
    mlp = item.widths
    assert mlp is not None
    if width < mlp.full_width:
        floor = ", at the floor of one step" if width == min(maker.widths(mlp)) else ""
        return ("its share of the prune rate" if rate is not None else "saves most for its error") + floor
    if not set(item.linears) <= set(wanted):
        return "full: left out by include/exclude"
    if len(maker.widths(mlp)) == 1:
        return f"full: no multiple of {maker.width_step} lies below it"
    return "full: worth its cost within the budget"


def _why_rank(item: _Item, name: str, rank: int | None, wanted: Collection[str], method: str) -> str:
    if rank is not None:
        return "saves most for its error"
    if name not in wanted:
        return "dense: left out by include/exclude"
    if method == "prune" or (method == "hybrid" and item.widths is not None):
        return f"dense: method {method} leaves its rank alone"
    return "dense: worth its cost within the budget"
