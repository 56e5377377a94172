"""Decomposition: one symmetric eigenproblem per layer, solved for every rank at once.

Every objective is `min ‖F^{1/2} (1 − Π) M^{1/2}‖_F²` over rank-r projectors Π, for a pair of moments on the layer's
smaller side: M says how large the directions are, F how much each of them matters.

    side     W_r      M               F for "loss"             F else
    output   Π W      G = Σ y yᵀ      S = Σ g gᵀ               1
    input    (W Π)    C = Σ x xᵀ      H = Σ (Wᵀg)(Wᵀg)ᵀ        Wᵀ W

"loss" takes the tokens of an image as independent. "fisher" does not: the loss of an image moves by `tr((1 − Π) P)`,
`P = Σ_tokens y gᵀ`. `Σ_images P Pᵀ` and `Σ_images Pᵀ P` are the Kronecker factors nearest to the second moment of P
after one power iteration from the identity (as Shampoo's are: Morwani et al., arXiv 2406.17748). Its M and F are the
means of these and of the ones above, all scaled to one trace.

With `F = Rᵀ R` and `R M Rᵀ = U Λ Uᵀ` the answer for all r is `Π_r = (R⁻¹ U_r)(U_rᵀ R)`, at a loss of `Σ_{i≥r} λ_i`.
M may be singular; F is damped first. On a CPU one thread solves one layer, on a GPU layers of one size are a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitlr.calibration.options import OBJECTIVES
from vitlr.calibration.statistics import LayerStatistics, Statistics
from vitlr.decomposition.objectives import damped, pair
from vitlr.decomposition.spectra import LayerSpectrum, Spectra
from vitlr.errors import InputError, NumericalError
from vitlr.ops.linalg.eigenproblems import DAMPING, solve, solve_batch
from vitlr.ops.linalg.eigh import BatchError

BATCH = 2**26  # entries of the matrices that a GPU solves at once: 113 of 768 x 768, half a GiB in fp64


def decompose(
    model: nn.Module,
    stats: Statistics,
    objective: str | None = None,
    *,
    centred: bool = False,
    damping: float = DAMPING,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int | None], None] | None = None,
) -> Spectra:
    """Solve all layers for all ranks in float64.

    `objective`: "loss" or "fisher" (estimated increase of the loss in nats, comparable across layers, the tokens of
    an image taken as independent or together), "output" (squared output error per image) or "normalized" (relative
    output error, arXiv 2402.06004: energies sum to 1). `centred` measures deviations from the mean and moves the mean
    into the bias. `damping` is added to F relative to its mean eigenvalue.

    Raises `InputError` where the statistics do not hold the objective, `NumericalError` naming the layer where a
    solve meets NaN or Inf or does not converge.
    """
    objective = objective or stats.default_objective
    check_options(objective, centred, damping)
    if objective != "output" and objective not in stats.objectives:
        raise InputError(
            f"these statistics hold {', '.join(stats.objectives)}, not {objective!r}; "
            f"calibrate with objective={objective!r}"
        )
    weights = layer_weights(model, stats)
    stats.check_fits(weights)
    names = list(stats.layers)

    def prepare(name: str) -> _Problem:
        layer, W = stats.layers[name], weights[name].detach().to(device, torch.float64)
        M, F = pair(layer, W, stats, objective, centred)
        mean = layer.sum("input_sum").to(W) / max(layer.tokens, 1) if centred else None
        if F is not None and not F.any():  # nothing depends on this layer: every rank is free
            return _Problem(layer, M, None, True, mean)
        return _Problem(layer, M, None if F is None else damped(F, W, layer.side, damping, objective), False, mean)

    batched = torch.device(device).type != "cpu"
    solved = (_in_batches if batched else _one_by_one)(prepare, stats.layers)
    spectra: dict[str, LayerSpectrum] = {}
    for spectrum in solved:
        spectra[spectrum.name] = spectrum
        if progress is not None:
            progress(len(spectra), len(names))
    return Spectra({name: spectra[name] for name in names}, objective, stats.fingerprint, centred, damping)


def check_options(objective: str | None, centred: bool, damping: float) -> None:
    """Raise `InputError` for options that no statistics could serve."""
    if objective not in (None, *OBJECTIVES):
        raise InputError(f"unknown objective {objective!r}, expected one of {', '.join(OBJECTIVES)}")
    if centred and objective in ("normalized", "fisher"):
        raise InputError(
            f"centred=True needs plain moments, objective {objective!r} has one per image; use 'loss' or 'output'"
        )
    if not 0 <= damping < float("inf"):
        raise InputError(f"damping={damping}, expected a number from 0 on")


@dataclass(frozen=True)
class _Problem:
    """What is to be solved for a layer; `free`: every rank costs nothing."""

    layer: LayerStatistics
    M: Tensor
    F: Tensor | None
    free: bool
    mean: Tensor | None

    def answer(self, energies: Tensor, P: Tensor, Q: Tensor) -> LayerSpectrum:
        """The spectrum, if it is one."""
        name = self.layer.name
        if self.free:
            energies = torch.zeros_like(energies)
        if not (torch.isfinite(energies).all() and torch.isfinite(P).all() and torch.isfinite(Q).all()):
            raise NumericalError(f"layer {name}: its moments or weights hold NaN or Inf; calibrate again in float32")
        layer = self.layer
        return LayerSpectrum(name, layer.in_features, layer.out_features, layer.side, energies, P, Q, self.mean)

    def failed(self, reason: object) -> NumericalError:
        """The error that names the layer."""
        return NumericalError(f"layer {self.layer.name}: the solve failed ({reason}); calibrate again in float32")


def _one_by_one(prepare: Callable[[str], _Problem], layers: Mapping[str, LayerStatistics]) -> Iterator[LayerSpectrum]:
    """One matrix per thread with sequential LAPACK beats one matrix on all threads (1.1 to 1.5 times on a CPU)."""

    def task(name: str) -> LayerSpectrum:
        problem = prepare(name)
        try:
            return problem.answer(*solve(problem.M, problem.F))
        except BatchError as cause:
            raise problem.failed(cause.reason) from cause
        except torch.linalg.LinAlgError as cause:
            raise problem.failed(cause) from cause

    threads = torch.get_num_threads()
    if threads == 1 or len(layers) == 1:
        yield from map(task, layers)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(task, layers)
    finally:
        torch.set_num_threads(threads)


def _in_batches(prepare: Callable[[str], _Problem], layers: Mapping[str, LayerStatistics]) -> Iterator[LayerSpectrum]:
    """Layers of one size together, as a GPU wants them: up to `BATCH` entries at a time."""
    sizes: dict[int, list[str]] = {}
    for name, layer in layers.items():
        sizes.setdefault(min(layer.in_features, layer.out_features), []).append(name)
    for n, same in sizes.items():
        step = max(1, BATCH // n**2)
        for start in range(0, len(same), step):
            problems = [prepare(name) for name in same[start : start + step]]
            for alike in ([p for p in problems if p.F is None], [p for p in problems if p.F is not None]):
                if not alike:
                    continue
                M = torch.stack([problem.M for problem in alike])
                F = None if alike[0].F is None else torch.stack([problem.F for problem in alike])  # type: ignore[misc]
                try:
                    solved = solve_batch(M, F)
                except BatchError as cause:
                    raise alike[cause.index].failed(cause.reason) from cause
                for problem, energies, P, Q in zip(alike, *solved, strict=True):
                    yield problem.answer(energies.clone(), P.clone(), Q.clone())  # none keeps the batch alive


def layer_weights(model: nn.Module, stats: Statistics) -> dict[str, Tensor]:
    """The weights that the statistics speak of; raises `InputError` where the model has no such linear layer."""
    modules = dict(model.named_modules())
    for name in stats.layers:
        if not isinstance(modules.get(name), nn.Linear):
            raise InputError(
                f"these statistics are of another model: it has no linear layer {name!r}; calibrate this model"
            )
    return {name: modules[name].weight for name in stats.layers}
