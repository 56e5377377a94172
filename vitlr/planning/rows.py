"""From what was chosen to the rows of a plan: what becomes of every layer and width, why, and what the whole costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vitlr.decomposition.spectra import Narrowing
from vitlr.planning.budgets import QUANTITIES, Budget
from vitlr.planning.choices import DENSE, Form, Item
from vitlr.planning.offers import Offers
from vitlr.planning.options import NARROWING
from vitlr.planning.plans import LayerPlan, MatrixPlan, Plan, WidthPlan
from vitlr.planning.timed import TimedOffers


def planned(offers: Offers, chosen: Sequence[Item], budget: Budget | None) -> Plan:
    """The plan of items that have one choice each."""
    spectra, options, sizes = offers.spectra, offers.options, offers.sizes
    timed = offers if isinstance(offers, TimedOffers) else None
    rows = {row.name: row for item in chosen for row in _layers(offers, item)}
    layers = tuple(rows[name] for name in spectra.layers)
    widths = tuple(row for item in chosen for row in _widths(offers, item))
    extra = {quantity: sum(_extra(item, quantity) for item in chosen) for quantity in QUANTITIES}
    totals = {quantity: getattr(sizes.total, quantity) for quantity in QUANTITIES}
    saved = _saved(offers, layers)
    others: tuple[MatrixPlan, ...] = ()
    room = float("inf") if budget is None or not offers.rounds else totals["bytes"] - budget.limit(totals["bytes"])
    if (offers.rounds and room > 0) or any(row.level is not None for row in layers):
        saved["bytes"] = totals["bytes"] - round(sizes.rest + sum(_bytes(offers, item) for item in chosen))
        others = tuple(_matrix(item) for item in chosen if item.matrix)
    narrows = offers.method in NARROWING
    without = "ranks given" if options.prune_rate is None else f"prune rate {options.prune_rate:g}"
    without = f"bits {options.stored[0]}" if options.stored and options.prune_rate is None else without
    return Plan(
        budget=str(budget) if budget else without,
        objective=spectra.objective,
        centred=spectra.centred,
        damping=spectra.damping,
        layers=layers,
        fingerprint=spectra.fingerprint,
        method=offers.method,
        widths=widths,
        others=others,
        compensated=options.compensate if narrows else True,
        ridge=options.ridge if narrows else 0.0,
        spectra=spectra,
        latency=None if timed is None else timed.promised(chosen),
        times=None if timed is None else timed.pace.times,
        **totals,
        **{f"{q}_kept": totals[q] - saved[q] + round(extra[q]) for q in QUANTITIES},
    )


def _matrix(item: Item) -> MatrixPlan:
    """The row of a matrix beside the linears."""
    return MatrixPlan(item.matrix, item.choices[0].bits or 0, float(item.prices.loss[0]))


def _bytes(offers: Offers, item: Item) -> float:
    if item.matrix:
        return float(item.prices.cost[0])
    width, forms, _ = item.choices[0]
    pairs = zip(item.linears, forms, strict=True)
    return sum(offers.bytes_of(item.narrowing, name, width, form) for name, form in pairs)


def _layers(offers: Offers, item: Item) -> Iterator[LayerPlan]:
    """A row for each of its linears."""
    width, forms, _ = item.choices[0]
    for name, form in zip(item.linears, forms, strict=True):
        spectrum = offers.spectra.layers[name]
        N, K = offers.shape(item.narrowing, name, width)
        prices, rounded = offers.prices(item.narrowing, name, width, [form]), form.level is not None
        weights = N * K if form.rank is None else form.rank * (N + K)
        yield LayerPlan(
            name,
            spectrum.in_features,
            spectrum.out_features,
            form.rank,
            offers.sizes.tokens[name],
            float(prices.loss[0]),
            _why(offers, item, name, form),
            kept_in=K if spectrum.in_features != K else None,
            kept_out=N if spectrum.out_features != N else None,
            level=form.level,
            int8=form.int8 or None,
            ms=round(offers.ms(item.narrowing, name, width, form), 4) if isinstance(offers, TimedOffers) else None,
            bits=round(8 * offers.bytes_of(item.narrowing, name, width, form) / weights, 3) if rounded else None,
        )


def _widths(offers: Offers, item: Item) -> Iterator[WidthPlan]:
    """A row for its width, where it has one."""
    width, narrowing = item.choices[0].width, item.narrowing
    if narrowing is not None and width is not None:
        lost, why = offers.width_loss(narrowing, width), _why_width(offers, item, narrowing, width)
        yield WidthPlan(narrowing.name, narrowing.full_width, width, lost, why, narrowing.kind)


def _extra(item: Item, quantity: str) -> float:
    """What its width costs besides weights and biases."""
    width = item.choices[0].width
    return 0.0 if item.narrowing is None or width is None else item.narrowing.extra(width, quantity)


def _saved(offers: Offers, rows: Sequence[LayerPlan]) -> dict[str, int]:
    """What the whole plan saves in weights and biases, in every quantity."""
    saved = dict.fromkeys(QUANTITIES, 0)
    for row in rows:
        weights, N = row.in_features * row.out_features, row.shape[0]
        if offers.sizes.has_bias[row.name]:
            bias = row.out_features - N
        else:
            bias = -N if row.int8 or (offers.spectra.centred and row.rank is not None) else 0
        if row.int8:  # factors of bytes have a bias each
            bias -= row.rank or 0
        saved["params"] += weights - row.params + bias
        saved["macs"] += round(weights * row.tokens) - row.macs
        own = 0 if row.int8 else (weights - row.params + bias) * offers.sizes.itemsize[row.name]
        saved["bytes"] += _saved_by_bytes(offers, row) if row.int8 else own
    return saved


def _saved_by_bytes(offers: Offers, row: LayerPlan) -> int:
    """Bytes that a linear of bytes saves: a code a weight, four floats a column and a row in place of a bias."""
    itemsize, (N, K) = offers.sizes.itemsize[row.name], row.shape
    before = (row.in_features * row.out_features + row.out_features * offers.sizes.has_bias[row.name]) * itemsize
    linears = [(N, K)] if row.rank is None else [(row.rank, K), (N, row.rank)]
    return before - sum(rows * columns + 8 * (rows + columns) for rows, columns in linears)


def _why_width(offers: Offers, item: Item, narrowing: Narrowing, width: int) -> str:
    step = offers.options.width_step
    offered = narrowing.choices(step)
    if width < narrowing.full_width:
        why = "saves most for its error" if offers.options.prune_rate is None else "its share of the prune rate"
        return f"{why}, at the floor of one step" if width == min(offered) else why
    if not set(item.linears) <= set(offers.wanted):
        return "full: left out by include/exclude"
    if len(offered) == 1:
        return f"full: no multiple of {step} lies below it" if narrowing.group == 1 else "full: it has one head"
    return "full: worth its cost within the budget"


def _why(offers: Offers, item: Item, name: str, form: Form) -> str:
    if isinstance(offers, TimedOffers):
        return _why_timed(offers, item, name, form)
    bits = offers.options.bits
    if form.level is None or not offers.rounds:
        why = _why_left(offers, name) if offers.rounds else _why_rank(offers, item, name, form.rank)
        return why if form.level is None else f"{why}; rounded: bits={bits!r}"
    if bits is not None:
        return f"rounded: bits={bits!r}"
    if form.rank is not None:
        return "both factors rounded: saves most for its error"
    coarsest = [*offers.ladder(name, item.choices[0].width, None)][-1]
    return "rounded: at the coarsest level" if form.level == coarsest else "rounded: saves most for its error"


def _why_timed(offers: TimedOffers, item: Item, name: str, form: Form) -> str:
    if name not in offers.wanted:
        return "dense: left out by include/exclude"
    own = "int8" if form.int8 else "dense" if form.rank is None else "low rank"
    slower = offers.slower(item, name, form)
    if slower is not None:
        return f"{own}: {slower} is slower here"
    return f"{own}: " + ("saves most time for its error" if form != DENSE else "worth its time within the budget")


def _why_left(offers: Offers, name: str) -> str:
    if name not in offers.wanted:
        return "as it is: left out by include/exclude"
    return "as it is: worth its cost within the budget"


def _why_rank(offers: Offers, item: Item, name: str, rank: int | None) -> str:
    options, method = offers.options, offers.method
    if rank is not None:
        if options.ranks is not None:
            return "given"
        return "uniform share" if options.uniform else "saves most for its error"
    if options.ranks is not None:
        return "dense: no rank given"
    if name not in offers.wanted:
        return "dense: left out by include/exclude"
    if method == "widths" or (method == "widths+ranks" and item.narrowing is not None):
        return f"dense: method {method} leaves its rank alone"
    N, K = offers.shape(None, name, None)
    if method == "lowrank" and not offers.ranks(N, K):
        return f"dense: no allowed rank is below break-even ({N * K / (N + K):.0f})"
    return "dense: worth its cost within the budget"
