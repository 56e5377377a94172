"""Decomposition: one symmetric eigenproblem per layer, all layers in one batch, every rank at once.

Every objective is `min ‖F^{1/2} (1 − Π) M^{1/2}‖_F²` over rank-r projectors Π, for a pair of moments on the layer's
smaller side: M says how large the directions are, F how much each of them matters.

    side     W_r      M               F for "loss"             F else
    output   Π W      G = Σ y yᵀ      S = Σ g gᵀ               1
    input    (W Π)    C = Σ x xᵀ      H = Σ (Wᵀg)(Wᵀg)ᵀ        Wᵀ W

With `F = Rᵀ R` and `R M Rᵀ = U Λ Uᵀ` the answer for all r is `Π_r = (R⁻¹ U_r)(U_rᵀ R)`, at a loss of `Σ_{i≥r} λ_i`.
M may be singular; F is damped first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from vitlr.errors import InputError, NumericalError
from vitlr.spectra import LayerSpectrum, Spectra
from vitlr.statistics import OBJECTIVES, LayerStatistics, Statistics

DAMPING = 0.1  # best on held-out calibration images where images are few, level with 0.01 where they are many
_JITTERS = [10.0**k for k in range(-12, -2)]  # relative to the mean eigenvalue; the first that suffices is taken


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

    `objective`: "loss" (estimated increase of the loss in nats, comparable across layers), "output" (squared output
    error per image) or "normalized" (relative output error, arXiv 2402.06004: energies sum to 1). `centred` measures
    deviations from the mean and moves the mean into the bias. `damping` is added to F relative to its mean eigenvalue.

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

    def solve_one(name: str) -> LayerSpectrum:
        layer, W = stats.layers[name], weights[name].detach().to(device, torch.float64)
        M, F = _pair(layer, W, stats, objective, centred)
        try:
            if F is not None and not F.any():  # nothing depends on this layer: every rank is free
                energies, P, Q = solve(M)
                energies = torch.zeros_like(energies)
            else:
                energies, P, Q = solve(M, None if F is None else _damped(F, W, layer.side, damping, objective))
        except torch.linalg.LinAlgError as cause:
            raise NumericalError(f"layer {name}: the solve failed ({cause}); calibrate again in float32") from cause
        if not (torch.isfinite(energies).all() and torch.isfinite(P).all() and torch.isfinite(Q).all()):
            raise NumericalError(f"layer {name}: its moments or weights hold NaN or Inf; calibrate again in float32")
        mean = layer.sum("input_sum").to(W) / max(layer.tokens, 1) if centred else None
        return LayerSpectrum(name, layer.in_features, layer.out_features, layer.side, energies, P, Q, mean)

    spectra: dict[str, LayerSpectrum] = {}
    for name, spectrum in zip(names, _map(solve_one, names, torch.device(device)), strict=True):
        spectra[name] = spectrum
        if progress is not None:
            progress(len(spectra), len(names))
    return Spectra(spectra, objective, stats.fingerprint, centred, damping)


def check_options(objective: str | None, centred: bool, damping: float) -> None:
    """Raise `InputError` for options that no statistics could serve."""
    if objective not in (None, *OBJECTIVES):
        raise InputError(f"unknown objective {objective!r}, expected one of {', '.join(OBJECTIVES)}")
    if centred and objective == "normalized":
        raise InputError("centred=True needs plain moments; the normalized ones weigh every image differently")
    if not 0 <= damping < float("inf"):
        raise InputError(f"damping={damping}, expected a number from 0 on")


def _map(task: Callable[[str], LayerSpectrum], names: list[str], device: torch.device) -> Iterator[LayerSpectrum]:
    """One matrix per thread with sequential LAPACK beats one matrix on all threads (1.1 to 1.5 times on a CPU)."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(names) == 1:
        yield from map(task, names)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(task, names)
    finally:
        torch.set_num_threads(threads)


def _pair(
    layer: LayerStatistics, W: Tensor, stats: Statistics, objective: str, centred: bool
) -> tuple[Tensor, Tensor | None]:
    """The moments M and F of one layer (F None stands for the identity), scaled to the objective's unit."""
    output_side = layer.side == "output"
    M = layer.sum("normalized" if objective == "normalized" else "moment").to(W)
    if centred:
        total = layer.sum("input_sum").to(W)
        total = W @ total if output_side else total
        M = M - torch.outer(total, total) / max(layer.tokens, 1)
    M = M / max(stats.images, 1)
    if objective == "loss":
        # ½ E[(gᵀδ)²] summed over the tokens of an image, taken as independent: M holds sums per image, F means per
        # token.
        return M, layer.sum("gradient").to(W) / (2 * max(layer.tokens, 1) * stats.samples)
    return M, None if output_side else W.mT @ W


def _damped(F: Tensor, W: Tensor, side: str, damping: float, objective: str) -> Tensor:
    """F with a floor under the output gradients: `S + δ · 1`, which on the input side reads `H + δ WᵀW`."""
    if objective != "loss":
        return F
    floor = torch.eye(len(F), dtype=F.dtype, device=F.device) if side == "output" else W.mT @ W
    return F + damping * F.trace() / floor.trace().clamp_min(torch.finfo(F.dtype).tiny) * floor


def layer_weights(model: nn.Module, stats: Statistics) -> dict[str, Tensor]:
    """The weights that the statistics speak of; raises `InputError` where the model has no such linear layer."""
    modules = dict(model.named_modules())
    for name in stats.layers:
        if not isinstance(modules.get(name), nn.Linear):
            raise InputError(
                f"these statistics are of another model: it has no linear layer {name!r}; calibrate this model"
            )
    return {name: modules[name].weight for name in stats.layers}


def solve(M: Tensor, F: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Solve `min ‖F^{1/2}(1 − P_r Q_r)M^{1/2}‖²` for all r: energies `[n]` (descending, ≥ 0), `P, Q [n, n]`, `Q P = 1`.

    `F = Rᵀ R` (Cholesky), `R M Rᵀ = U Λ Uᵀ`, `P = R⁻¹ U`, `Q = Uᵀ R`. M symmetric positive semidefinite, possibly
    singular; F positive semidefinite up to rounding, or None for the identity. Raises `torch.linalg.LinAlgError` on no
    convergence.
    """
    if F is None:
        energies, U = torch.linalg.eigh(M)
        U = U.flip(-1)
        return energies.flip(-1).clamp_min(0), U, U.mT
    L = _cholesky(F)  # R = Lᵀ
    K = L.mT @ M @ L
    energies, U = torch.linalg.eigh((K + K.mT) / 2)
    U = U.flip(-1)
    P = torch.linalg.solve_triangular(L.mT, U, upper=True)
    return energies.flip(-1).clamp_min(0), P, U.mT @ L.mT


def _cholesky(F: Tensor) -> Tensor:
    """The factor `F = L Lᵀ` of a matrix that is positive semidefinite up to rounding, with the least jitter that helps.

    Moments of float32 products carry noise of either sign, 1e-7 of the largest eigenvalue, in the directions that a
    rank-deficient weight leaves empty. Raises `torch.linalg.LinAlgError` where F is further from semidefinite.
    """
    one = torch.eye(len(F), dtype=F.dtype, device=F.device)
    level = F.trace() / len(F)
    for jitter in _JITTERS:
        L, info = torch.linalg.cholesky_ex(F + jitter * level * one)
        if info == 0:
            return L
    raise torch.linalg.LinAlgError("its gradient moment is not positive semidefinite")
