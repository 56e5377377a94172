"""Joint allocation: ranks and hidden widths as options of one knapsack under one budget.

An MLP is one item, and so is an attention that may lose value channels: its options are a width and a rank, or dense,
for each of its linears as they are at that width. Any other linear is an item of its own. Losses of a width and of the
ranks within it add up, since what a compensated width loses is uncorrelated with what it keeps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from vitlr.decomposition.spectra import Narrowing, Spectra
from vitlr.decomposition.value_widths import GRAINS
from vitlr.errors import InputError
from vitlr.planning.allocation import Sizes, check_counts, match_layers
from vitlr.planning.budgets import Budget
from vitlr.planning.choices import Item, Maker
from vitlr.planning.knapsack import Options, choose
from vitlr.planning.plans import METHODS, LayerPlan, Plan, WidthPlan

ATTENTION = ("scores", *GRAINS, "none")  # what attention may lose
WIDTH_SCALE = 1.0  # what a predicted loss of widths counts against one of ranks (docs/method.md)


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
    """Choose a width for every MLP (and every attention, where `spectra` has its widths), and a rank or dense for every
    layer.

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
    maker = Maker(spectra, sizes, budget.quantity if budget else "params", rank_step, min_rank, width_step, width_scale)
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
    rows, mlps, extra = [], [], dict.fromkeys(totals, 0.0)
    for item, index in zip(items, chosen or [], strict=True):
        width, ranks = item.choices[index]
        if item.widths is not None and width is not None:
            why = _why_width(item, width, maker, wanted, prune_rate)
            lost = maker.width_errors(item.widths, width)
            mlps.append(WidthPlan(item.widths.name, item.widths.full_width, width, lost, why, item.widths.kind))
            extra = {q: extra[q] + item.widths.extra(width, q) for q in totals}
        rows += _layer_rows(maker, item, width, ranks, wanted, method)
    order = {name: index for index, name in enumerate(spectra.layers)}
    rows.sort(key=lambda row: order[row.name])
    saved = _saved(rows, sizes)
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
        **{f"{q}_kept": totals[q] - saved[q] + round(extra[q]) for q in totals},
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
    attention: str | None = None,
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
    if attention not in (None, *ATTENTION):
        raise InputError(f"unknown attention={attention!r}, expected one of {', '.join(ATTENTION)}")
    if attention not in (None, "none") and (method not in ("prune", "joint") or prune_rate is not None):
        how = f"method={method!r}" if prune_rate is None else "prune_rate=, which is of hidden neurons"
        raise InputError(f"attention={attention!r} goes with a budget and method='prune' or 'joint', not with {how}")
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


def _groups(spectra: Spectra) -> list[tuple[tuple[str, ...], Narrowing | None]]:
    """The linears of every MLP or attention with widths together, and all others alone, in the order of the layers."""
    of = {name: mlp for mlp in spectra.widths.values() for name in (*mlp.first, mlp.second)}
    groups: list[tuple[tuple[str, ...], Narrowing | None]] = []
    for name in spectra.layers:
        mlp = of.get(name)
        if mlp is None:
            groups.append(((name,), None))
        elif name == mlp.second:
            groups.append(((*mlp.first, mlp.second), mlp))
    return groups


def _at_rate(items: list[Item], rate: float) -> list[Item]:
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


def _layer_rows(
    maker: Maker,
    item: Item,
    width: int | None,
    ranks: Sequence[int | None],
    wanted: Collection[str],
    method: str,
) -> list[LayerPlan]:
    rows = []
    for name, rank in zip(item.linears, ranks, strict=True):
        spectrum = maker.spectra.layers[name]
        N, K = maker.shape(item.widths, name, width)
        error = 0.0 if rank is None else float(maker.errors(item.widths, name, width)[rank])
        rows.append(
            LayerPlan(
                name,
                spectrum.in_features,
                spectrum.out_features,
                rank,
                maker.sizes.tokens[name],
                error,
                _why_rank(item, name, rank, wanted, method),
                kept_in=K if spectrum.in_features != K else None,
                kept_out=N if spectrum.out_features != N else None,
            )
        )
    return rows


def _saved(rows: Sequence[LayerPlan], sizes: Sizes) -> dict[str, int]:
    """What the whole plan saves, in every quantity."""
    saved = {"params": 0, "macs": 0, "bytes": 0}
    for row in rows:
        weights = row.in_features * row.out_features
        bias = row.out_features - row.shape[0] if sizes.has_bias[row.name] else 0
        saved["params"] += weights - row.params + bias
        saved["macs"] += round(weights * row.tokens) - row.macs
        saved["bytes"] += (weights - row.params + bias) * sizes.itemsize[row.name]
    return saved


def _why_width(item: Item, width: int, maker: Maker, wanted: Collection[str], rate: float | None) -> str:
    mlp = item.widths
    assert mlp is not None
    offered = mlp.choices(maker.width_step)
    if width < mlp.full_width:
        floor = ", at the floor of one step" if width == min(offered) else ""
        return ("its share of the prune rate" if rate is not None else "saves most for its error") + floor
    if not set(item.linears) <= set(wanted):
        return "full: left out by include/exclude"
    if len(offered) == 1:
        return f"full: no multiple of {maker.width_step} lies below it" if mlp.group == 1 else "full: it has one head"
    return "full: worth its cost within the budget"


def _why_rank(item: Item, name: str, rank: int | None, wanted: Collection[str], method: str) -> str:
    if rank is not None:
        return "saves most for its error"
    if name not in wanted:
        return "dense: left out by include/exclude"
    if method == "prune" or (method == "hybrid" and item.widths is not None):
        return f"dense: method {method} leaves its rank alone"
    return "dense: worth its cost within the budget"
