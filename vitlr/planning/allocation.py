"""Allocation: spend one budget over all layers, so that the predicted error of the whole model is least."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vitlr.decomposition.spectra import LayerSpectrum, Spectra
from vitlr.errors import InputError
from vitlr.measuring.cost import Cost
from vitlr.planning.budgets import Budget
from vitlr.planning.knapsack import Options, choose
from vitlr.planning.plans import LayerPlan, Plan


@dataclass(frozen=True)
class Sizes:
    """What allocation must know of the model beside the spectra: its totals, tokens per image, bytes per weight."""

    total: Cost
    tokens: Mapping[str, float]
    itemsize: Mapping[str, int]
    has_bias: Mapping[str, bool]


@dataclass(frozen=True)
class _Layer:
    """One layer's choices: ranks that are smaller than dense, and dense itself (rank None)."""

    spectrum: LayerSpectrum
    ranks: tuple[int | None, ...]
    errors: np.ndarray  # error of rank r = 0 … n
    unit: float  # cost of one weight in the budget's quantity
    extra: float  # cost of the bias that a centred layer gains

    @property
    def weights(self) -> int:
        return self.spectrum.in_features * self.spectrum.out_features

    @property
    def per_rank(self) -> int:
        return self.spectrum.in_features + self.spectrum.out_features

    def cost(self, rank: int | None) -> float:
        return self.unit * self.weights if rank is None else self.unit * rank * self.per_rank + self.extra

    def loss(self, rank: int | None) -> float:
        return 0.0 if rank is None else float(self.errors[rank])

    def options(self, allowed: Collection[int] | None = None) -> tuple[tuple[int | None, ...], Options]:
        ranks = tuple(r for r in self.ranks if allowed is None or r is None or r in allowed)
        return ranks, Options(np.array([self.cost(r) for r in ranks]), np.array([self.loss(r) for r in ranks]))


def allocate(
    spectra: Spectra,
    sizes: Sizes,
    budget: Budget | None,
    *,
    uniform: bool = False,
    ranks: Mapping[str, int] | None = None,
    rank_step: int = 16,
    min_rank: int = 1,
    rank_buckets: int | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Plan:
    """Choose a rank, or dense, for every layer.

    Ranks are multiples of `rank_step` from `min_rank` up to where low rank stops being smaller than dense.
    `uniform` gives every layer the same share of its weights, `ranks` are taken as they are (the rest stays dense),
    `rank_buckets` allows so many different ranks to the layers of one position in the blocks; `include` and `exclude`
    are regular expressions on layer names. Equal spectra give an equal plan.

    Raises `InputError` where the budget cannot be reached, saying what can be, and for bad arguments.
    """
    check_options(
        budget, uniform=uniform, ranks=ranks, rank_step=rank_step, min_rank=min_rank, rank_buckets=rank_buckets
    )
    if ranks is not None and (include is not None or exclude is not None):
        raise InputError("ranks= names the layers itself; it does not go with include= or exclude=")
    if not spectra.layers:
        raise InputError("there is no layer to compress")
    quantity = budget.quantity if budget else "params"
    chosen_names = match_layers(list(spectra.layers), include, exclude)
    layers: dict[str, _Layer] = {}
    for name, spectrum in spectra.layers.items():
        unit = {"params": 1.0, "macs": sizes.tokens[name], "bytes": float(sizes.itemsize[name])}[quantity]
        extra_bias = spectra.centred and not sizes.has_bias[name] and quantity != "macs"
        steps = _ranks(spectrum, rank_step, min_rank) if name in chosen_names else ()
        layers[name] = _Layer(
            spectrum, (*steps, None), spectrum.errors().cpu().numpy(), unit, unit * spectrum.out_features * extra_bias
        )
    if ranks is not None or budget is None:
        chosen = _by_hand(layers, ranks or {})
    else:
        chosen = _spend(layers, sizes.total, budget, uniform, rank_buckets)
    plan = _plan(spectra, layers, chosen, sizes, budget, _reasons(layers, chosen, chosen_names, ranks, uniform))
    if budget is not None and getattr(plan, f"{quantity}_kept") > budget.limit(getattr(plan, quantity)) + 0.5:
        raise InputError(
            f"the ranks given keep {getattr(plan, f'{quantity}_kept'):,} {quantity}, over the budget {budget}"
        )
    return plan


def _spend(
    layers: Mapping[str, _Layer], total: Cost, budget: Budget, uniform: bool, buckets: int | None
) -> dict[str, int | None]:
    """The ranks that fit what the budget leaves to the compressible layers; `InputError` where none do."""
    whole = float(getattr(total, budget.quantity))
    outside = whole - sum(layer.cost(None) for layer in layers.values())
    room = budget.limit(whole) - outside
    chosen = _uniform(layers, room) if uniform else _best(layers, room, buckets)
    if chosen is not None:
        return chosen
    least = outside + sum(min(layer.cost(r) for r in layer.ranks) for layer in layers.values())
    raise InputError(
        f"budget {budget} cannot be reached: the smallest plan keeps {least / whole:.2%} ({least:,.0f} of {whole:,.0f} "
        f"{budget.quantity}; {outside / whole:.2%} lie outside the compressible layers); raise the budget or allow "
        "smaller ranks (a smaller rank step)"
    )


def check_options(
    budget: Budget | None,
    *,
    uniform: bool = False,
    ranks: Mapping[str, int] | None = None,
    rank_step: int = 16,
    min_rank: int = 1,
    rank_buckets: int | None = None,
) -> None:
    """Raise `InputError` for options that no spectra could serve."""
    check_counts(rank_step=rank_step, min_rank=min_rank, rank_buckets=rank_buckets)
    if ranks is not None and (uniform or rank_buckets):
        raise InputError("ranks= names the ranks itself; it does not go with uniform= or rank_buckets=")
    if uniform and rank_buckets:
        raise InputError("uniform=True gives one rank a shape already; it does not go with rank_buckets=")
    if ranks is None and budget is None:
        raise InputError("give a budget such as 'params:40%', or ranks={layer: rank}")


def check_counts(**values: object) -> None:
    """Raise `InputError` for steps and the like that are no whole numbers from 1 on; None is none."""
    for label, value in values.items():
        if value is not None and (_whole(value) or 0) < 1:
            raise InputError(f"{label}={value!r}, expected a whole number from 1 on")


def _whole(value: object) -> int | None:
    """The value as an int where it is a whole number (numpy's too), else None."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else None


def match_layers(
    names: Sequence[str], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> set[str]:
    """The names that some `include` pattern finds (all, where none is given) and no `exclude` pattern does."""
    wanted = set(names)
    for patterns, keep in ((include, True), (exclude, False)):
        if patterns is None:
            continue
        hits: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            try:
                found = {name for name in names if re.search(pattern, name)}
            except re.error as cause:
                raise InputError(f"pattern {pattern!r} is no regular expression ({cause})") from cause
            if not found:
                raise InputError(f"pattern {pattern!r} matches no layer; the first are {', '.join(list(names)[:3])}")
            hits |= found
        wanted = wanted & hits if keep else wanted - hits
    if not wanted:
        raise InputError("include= and exclude= together leave no layer to compress")
    return wanted


def _ranks(spectrum: LayerSpectrum, step: int, least: int) -> tuple[int, ...]:
    """Multiples of `step`, from `least`, at which two factors are smaller than the matrix."""
    n, k = spectrum.out_features, spectrum.in_features
    first = -(-least // step) * step
    return tuple(r for r in range(first, spectrum.max_rank + 1, step) if r * (n + k) < n * k)


def _best(layers: Mapping[str, _Layer], room: float, buckets: int | None) -> dict[str, int | None] | None:
    """The knapsack, and where `buckets` are asked for, once more over quantiles of the ranks it chose first."""
    chosen = _solve(layers, room, {})
    if chosen is None or buckets is None:
        return chosen
    positions: dict[tuple[str, int, int], list[str]] = {}
    for name, layer in layers.items():  # stages of other widths (Swin) are positions of their own
        key = (re.sub(r"\d+", "*", name), layer.spectrum.out_features, layer.spectrum.in_features)
        positions.setdefault(key, []).append(name)
    for spare in (0, 1):  # the tightest budgets need a bucket for the smallest rank
        allowed: dict[str, set[int]] = {}
        for names in positions.values():
            found = sorted(r for r in (chosen[name] for name in names) if r is not None)
            ranks = {found[round(q)] for q in np.linspace(0, len(found) - 1, buckets - spare)} if found else set()
            smallest = min((r for name in names for r in layers[name].ranks if r is not None), default=None)
            if smallest is not None and len(ranks) < buckets:
                ranks.add(smallest)
            allowed.update(dict.fromkeys(names, ranks))
        bucketed = _solve(layers, room, allowed)
        if bucketed is not None:
            return bucketed
    return None


def _solve(
    layers: Mapping[str, _Layer], room: float, allowed: Mapping[str, Collection[int]]
) -> dict[str, int | None] | None:
    choices = {name: layer.options(allowed.get(name)) for name, layer in layers.items()}
    picked = choose([options for _, options in choices.values()], room)
    if picked is None:
        return None
    return {name: ranks[i] for (name, (ranks, _)), i in zip(choices.items(), picked, strict=True)}


def _uniform(layers: Mapping[str, _Layer], room: float) -> dict[str, int | None] | None:
    """The largest share ρ such that rank ≤ ρ N K / (N + K) in every layer fits; a rank at break-even means dense."""

    def at(share: float) -> dict[str, int | None]:
        chosen: dict[str, int | None] = {}
        for name, layer in layers.items():
            steps = [r for r in layer.ranks if r is not None]
            fitting = [r for r in steps if r * layer.per_rank <= share * layer.weights]
            dense = share >= 1 or not steps
            chosen[name] = None if dense else (fitting[-1] if fitting else steps[0])
        return chosen

    def fits(chosen: dict[str, int | None]) -> bool:
        return sum(layers[name].cost(rank) for name, rank in chosen.items()) <= room

    if fits(at(1.0)):
        return at(1.0)
    shares = sorted(
        {r * layer.per_rank / layer.weights for layer in layers.values() for r in layer.ranks if r is not None}
    )
    low, high = -1, len(shares)  # at(shares[low]) fits, at(shares[high]) does not
    if not shares or not fits(at(0.0)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(at(shares[middle])) else (low, middle)
    return at(shares[low] if low >= 0 else 0.0)


def _by_hand(layers: Mapping[str, _Layer], ranks: Mapping[str, int]) -> dict[str, int | None]:
    for name, rank in ranks.items():
        if name not in layers:
            raise InputError(
                f"ranks= names {name!r}, which is no compressible layer; the first is {next(iter(layers))!r}"
            )
        limit = layers[name].spectrum.max_rank
        if not 1 <= (_whole(rank) or 0) <= limit:
            raise InputError(f"layer {name}: rank {rank!r}, expected a whole number from 1 to {limit}")
    return {name: _whole(ranks[name]) if name in ranks else None for name in layers}


def _reasons(
    layers: Mapping[str, _Layer], chosen: Mapping[str, int | None], wanted: set[str], by_hand: object, uniform: bool
) -> dict[str, str]:
    reasons = {}
    for name, layer in layers.items():
        first = next((r for r in layer.ranks if r is not None), None)
        even = layer.weights / layer.per_rank
        if chosen[name] is not None:
            reasons[name] = (
                "given" if by_hand is not None else "uniform share" if uniform else "saves most for its error"
            )
        elif by_hand is not None:
            reasons[name] = "dense: no rank given"
        elif name not in wanted:
            reasons[name] = "dense: left out by include/exclude"
        elif first is None:
            reasons[name] = f"dense: no allowed rank is below break-even ({even:.0f})"
        else:
            reasons[name] = "dense: worth its cost within the budget"
    return reasons


def _plan(
    spectra: Spectra,
    layers: Mapping[str, _Layer],
    chosen: Mapping[str, int | None],
    sizes: Sizes,
    budget: Budget | None,
    reasons: Mapping[str, str],
) -> Plan:
    rows = tuple(
        LayerPlan(
            name,
            layer.spectrum.in_features,
            layer.spectrum.out_features,
            rank,
            sizes.tokens[name],
            layer.loss(rank),
            reasons[name],
        )
        for name, layer, rank in ((name, layers[name], chosen[name]) for name in layers)
    )
    saved = {"params": 0, "macs": 0, "bytes": 0}
    for row in rows:
        added_bias = (
            row.out_features if spectra.centred and row.rank is not None and not sizes.has_bias[row.name] else 0
        )
        weights = row.in_features * row.out_features
        saved["params"] += weights - row.params - added_bias
        saved["macs"] += round(weights * row.tokens) - row.macs
        saved["bytes"] += (weights - row.params - added_bias) * sizes.itemsize[row.name]
    totals = {q: getattr(sizes.total, q) for q in saved}
    kept = {f"{q}_kept": totals[q] - saved[q] for q in saved}
    return Plan(
        budget=str(budget) if budget else "ranks given",
        objective=spectra.objective,
        centred=spectra.centred,
        damping=spectra.damping,
        layers=rows,
        fingerprint=spectra.fingerprint,
        spectra=spectra,
        **totals,
        **kept,
    )
