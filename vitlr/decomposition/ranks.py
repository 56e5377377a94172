"""Ranks: one symmetric eigenproblem per layer, solved for every rank at once.

Every objective is `min ‖F^{1/2} (1 − Π) M^{1/2}‖_F²` over rank-r projectors Π, for the pair of moments of `objectives`
on the layer's smaller side: M says how large the directions are, F how much each of them matters.

With `F = Rᵀ R` and `R M Rᵀ = U Λ Uᵀ` the answer for all r is `Π_r = (R⁻¹ U_r)(U_rᵀ R)`, at a loss of `Σ_{i≥r} λ_i`.
M may be singular; F is damped first. On a CPU one thread solves one layer, on a GPU layers of one size are a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitlr.anatomy.reading import Parts
from vitlr.calibration.statistics import LayerStatistics, Statistics
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.spectra import LayerSpectrum
from vitlr.errors import NumericalError
from vitlr.ops.linalg.eigenproblems import solve, solve_batch
from vitlr.ops.linalg.eigh import BatchError
from vitlr.ops.linalg.threads import each_in_threads

BATCH = 2**26  # entries of the matrices that a GPU solves at once: 113 of 768 x 768, half a GiB in fp64


def solve_ranks(
    names: Sequence[str], parts: Parts, stats: Statistics, objective: Objective, device: str | torch.device = "cpu"
) -> Iterator[LayerSpectrum]:
    """All ranks of these layers in float64, each as it is done. `NumericalError` naming one that meets NaN or Inf."""

    def prepare(name: str) -> _Problem:
        layer, W = stats.layers[name], parts.linears[name].weight.detach().to(device, torch.float64)
        M, F = objective.M(layer, W), objective.F(layer, W)
        mean = layer.sum("input_sum").to(W) / max(layer.tokens, 1) if objective.centred else None
        if F is not None and not F.any():  # nothing depends on this layer: every rank is free
            return _Problem(layer, M, None, True, mean)
        return _Problem(layer, M, None if F is None else objective.damped(F, W, layer.side), False, mean)

    batched = torch.device(device).type != "cpu"
    return (_in_batches if batched else _one_by_one)(prepare, {name: stats.layers[name] for name in names})


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
        mean = None if self.mean is None else self.mean.cpu()
        tensors = energies.cpu(), P.cpu(), Q.cpu()
        return LayerSpectrum(name, layer.in_features, layer.out_features, layer.side, *tensors, mean)

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

    return each_in_threads(task, [*layers])


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
