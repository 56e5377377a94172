"""Solving everything a plan chooses from, in one loop: ranks of all layers, widths of MLPs and attentions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vitlr.anatomy.reading import Parts, read
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.levels import measured_linears, solve_levels
from vitlr.decomposition.mlp_widths import MlpSpectrum, measured_mlps, solve_mlp
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.options import Decomposition
from vitlr.decomposition.query_key_widths import measured_query_keys, solve_query_keys
from vitlr.decomposition.ranks import solve_ranks
from vitlr.decomposition.spectra import LayerSpectrum, Levels, Narrowing, Spectra
from vitlr.decomposition.value_widths import macs_between, measured_values, solve_values
from vitlr.decomposition.widths import Solved
from vitlr.errors import InputError, NumericalError
from vitlr.ops.linalg.eigenproblems import DAMPING
from vitlr.ops.linalg.threads import each_in_threads
from vitlr.runtime import processes
from vitlr.runtime.progress import Progress, shows


@shows("solving", "layers")
def decompose(
    model: nn.Module,
    stats: Statistics,
    objective: str | None = None,
    *,
    centred: bool = False,
    damping: float = DAMPING,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Spectra:
    """Solve all layers for all ranks in float64.

    `objective`: "loss" or "fisher" (estimated increase of the loss in nats, comparable across layers, the tokens of
    an image taken as independent or together), "output" (squared output error per image) or "normalized" (relative
    output error, arXiv 2402.06004: energies sum to 1). `centred` measures deviations from the mean and moves the mean
    into the bias. `damping` is added to F relative to its mean eigenvalue. Ranks are solved on `device`, by default
    where the model is, and all that is found lies on the CPU.

    Raises `InputError` where the statistics do not hold the objective, `NumericalError` naming the layer where a
    solve meets NaN or Inf or does not converge.
    """
    options = Decomposition(objective=objective, centred=centred, damping=damping)
    return solve(read(model), stats, Objective.of(stats, options), device=device, progress=progress)


def solve(
    parts: Parts,
    stats: Statistics,
    objective: Objective,
    kinds: Collection[str] = (),
    options: Decomposition | None = None,
    *,
    step: int = 0,
    known: Spectra | None = None,
    at_hand: Mapping[tuple[str, str], Solved] = MappingProxyType({}),
    device: str | torch.device | None = None,
    skip: Callable[[NumericalError], None] | None = None,
    progress: Progress | None = None,
) -> Spectra:
    """The spectra of all layers and of all `kinds` of what gets narrower: "mlp", "query_keys", "channels" or "heads".

    Of the kind "rounding" are the levels that weights may be rounded to, and with "factors" those of ranks as well.
    With a `step` the ranks of second linears are solved along with widths, at those of its multiples offered so.

    `known` ones are kept, and widths that are `at_hand`, by kind and name, are not solved. What cannot be solved is
    refused before anything is; an MLP or attention whose numbers fail is left out where `skip` is there to be told.
    Raises `InputError` for statistics of another model and those that lack what a kind needs, `NumericalError` naming
    the layer, MLP or attention.
    """
    check_fits(parts, stats)
    device = next((linear.weight.device for linear in parts.linears.values()), None) if device is None else device
    if known is not None and not kinds:
        return known
    options = options or Decomposition()
    layers, widths = ({}, {}) if known is None else (dict(known.layers), dict(known.widths))
    widths = {name: width for name, width in widths.items() if width.kind in kinds and width.fits(options, step)}
    levels = {} if known is None else dict(known.levels)
    roundable = measured_linears(stats, objective) if "rounding" in kinds else []
    missing = [
        kind
        for kind in kinds
        if kind not in ("rounding", "factors") and all(width.kind != kind for width in widths.values())
    ]
    tasks = [task for kind in missing for task in _tasks(kind, parts, stats, objective, options, step, at_hand)]
    names = [name for name in stats.layers if name not in layers]
    total, reached = len(names) + len(tasks) + len(roundable), 0

    def told(done: int) -> None:
        nonlocal reached
        reached = max(reached, done)  # of several processes each hears of its share, and then of all
        if progress is not None and total:
            progress(reached, total)

    def rank(own: Sequence[str]) -> Iterator[LayerSpectrum]:
        found = solve_ranks(own, parts, stats, objective, device or "cpu")
        return found if processes.world() == 1 else iter(sorted(found, key=lambda layer: own.index(layer.name)))

    told(0)  # the first one may take a while
    # Widths first: what they need on the way is most while the factors of all layers are not there yet.
    ranked = processes.shared_out(rank, names, lambda done: told(len(tasks) + done))
    solved: Iterator[LayerSpectrum | Narrowing] = chain(_done(tasks, skip, told), ranked)
    done = 0
    for done, spectrum in enumerate(solved, 1):
        if isinstance(spectrum, LayerSpectrum):
            layers[spectrum.name] = spectrum
        else:
            widths[spectrum.name] = spectrum
        told(done)
    of = {name: mlp for mlp in widths.values() if isinstance(mlp, MlpSpectrum) for name in (*mlp.first, mlp.second)}
    factored = layers if "factors" in kinds else {}
    unknown = [name for name in roundable if not _known(levels.get(name), of.get(name), factored.get(name))]
    for also, found in enumerate(solve_levels(unknown, parts, stats, objective, of, factored, levels), 1):
        levels[found.name] = found
        told(done + also)
    layers = {name: layers[name] for name in stats.layers}  # batches come in an order of their own
    made = objective.name, stats.fingerprint, objective.centred, objective.damping
    return Spectra(layers, *made, widths, levels)


def _known(levels: Levels | None, narrowing: Narrowing | None, spectrum: LayerSpectrum | None) -> bool:
    return levels is not None and levels.narrowing is narrowing and levels.spectrum is spectrum


def _done(
    tasks: Sequence[_Task], skip: Callable[[NumericalError], None] | None, told: Callable[[int], None]
) -> Iterator[Narrowing]:
    """What tasks give, without those whose numbers fail where `skip` is told of them."""

    def tried(task: _Task) -> Any:
        try:
            found = task.solve(task.known)
        except NumericalError as cause:
            return cause
        return found if processes.world() == 1 else found.solution  # small: what it was made from, all have

    answers = processes.shared_out(lambda own: each_in_threads(tried, own), tasks, told)
    for task, found in zip(tasks, answers, strict=True):
        if not isinstance(found, NumericalError):
            yield found if processes.world() == 1 else task.solve(found)
        elif skip is None:
            raise found
        else:
            skip(found)


@dataclass(frozen=True)
class _Task:
    """How something that may get narrower is solved, from what is `known` of it if anything is."""

    solve: Callable[[Any], Narrowing]
    known: Solved | None = None


def _tasks(
    kind: str,
    parts: Parts,
    stats: Statistics,
    objective: Objective,
    options: Decomposition,
    step: int,
    at_hand: Mapping[tuple[str, str], Solved],
) -> list[_Task]:
    """What there is to solve of one kind; `InputError` where there is nothing, or it was not measured."""
    if kind == "mlp":
        mlps = measured_mlps(parts, stats, objective)
        how = stats, objective, options, step
        return [_Task(partial(solve_mlp, mlp, *how), at_hand.get((kind, name))) for name, mlp in mlps.items()]
    if kind == "query_keys":
        found = measured_query_keys(parts, stats, objective)
        return [_Task(partial(solve_query_keys, attention, stats, objective)) for attention in found.values()]
    found = measured_values(parts, stats, objective)
    macs = macs_between(parts, stats, found)
    return [
        _Task(
            partial(solve_values, attention, parts, stats, objective, kind, macs.get(name), options, step),
            at_hand.get((kind, name)),
        )
        for name, attention in found.items()
    ]


def check_fits(parts: Parts, stats: Statistics) -> None:
    """Raise `InputError` unless the statistics are of these linears, with these weights."""
    missing = [name for name in stats.layers if name not in parts.linears]
    if missing:
        raise InputError(
            f"these statistics are of another model: it has no linear layer {missing[0]!r}; calibrate this model"
        )
    stats.check_fits(parts.weights(stats.layers))
