"""Five published low-rank methods over our stages: each turns weights and statistics into the same `Spectra` as ours.

All five truncate the singular values (or eigenvalues) of a weighted weight matrix `D W R`, and all of them give
`W_r = P_r Q_r W`, a projection of the layer's output: `U` from `D W R = U S Vᵀ`, `P = D⁻¹ U`, `Q = Uᵀ D`. The right
weight never has to be inverted, because `S_r V_rᵀ R⁻¹ = U_rᵀ D W`: what the papers compute with an inverse is the
same matrix. Allocation and surgery are ours for all of them, so that a comparison differs in the factors alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitlr.anatomy.reading import read
from vitlr.calibration.statistics import LayerStatistics, Statistics
from vitlr.decomposition.solving import check_fits
from vitlr.decomposition.spectra import LayerSpectrum, Spectra
from vitlr.errors import InputError, NumericalError
from vitlr.runtime.progress import Progress

Baseline = Callable[..., Spectra]


def svd(model: nn.Module, stats: Statistics, *, progress: Progress | None = None) -> Spectra:
    """Plain SVD, `min ||W - A B||_F`: no data at all (Eckart and Young, 1936)."""

    def solve(W: Tensor, layer: LayerStatistics) -> LayerSpectrum:
        U, S = _svd(W, layer.name)
        return _spectrum(layer, U, S.square())

    return _each(model, stats, "svd", solve, progress)


def asvd(model: nn.Module, stats: Statistics, *, alpha: float = 0.5, progress: Progress | None = None) -> Spectra:
    """ASVD, `min ||(W - A B) diag(mean |x|)^alpha||_F`; alpha = 0.5 as published (arXiv 2312.05821).

    The paper's sensitivity-based choice of ranks is not part of it: allocation is a stage of its own here.
    Raises `InputError` where the statistics lack `input_abs`.
    """

    def solve(W: Tensor, layer: LayerStatistics) -> LayerSpectrum:
        scale = _extra(layer, "input_abs", W).div(max(layer.tokens, 1)).pow(alpha).add(1e-6)  # 1e-6: the authors' code
        U, S = _svd(W * scale, layer.name)
        return _spectrum(layer, U, S.square())

    return _each(model, stats, "asvd", solve, progress)


def fwsvd(model: nn.Module, stats: Statistics, *, progress: Progress | None = None) -> Spectra:
    """FWSVD, `min ||D (W - A B)||_F`, `D_ii^2 = sum_j E[(dL/dW_ij)^2]` (arXiv 2207.00112).

    The paper takes the gradients of labelled examples; ours are what `calibrate` collected (targets sampled from the
    model's own prediction unless `loss_fn=` says otherwise). Raises `InputError` where `row_gradient` is missing.
    """

    def solve(W: Tensor, layer: LayerStatistics) -> LayerSpectrum:
        d = _extra(layer, "row_gradient", W).div(max(stats.images, 1)).clamp_min(0).sqrt()
        largest = d.amax()
        # A row without gradient has no weight, and D no inverse: 1e-6 of the largest keeps D⁻¹ U exact in fp64.
        d = (d / largest).clamp_min(1e-6) if largest > 0 else torch.ones_like(d)
        U, S = _svd(d[:, None] * W, layer.name)
        return _spectrum(layer, U / d[:, None], S.square() * largest.square(), (U * d[:, None]).mT)

    return _each(model, stats, "fwsvd", solve, progress)


def svd_llm(model: nn.Module, stats: Statistics, *, progress: Progress | None = None) -> Spectra:
    """SVD-LLM's truncation-aware whitening, `min ||(W - A B) C^{1/2}||_F` (arXiv 2403.07378).

    Without the paper's optional parameter update. Raises `InputError` where the statistics lack the input moment.
    """

    def solve(W: Tensor, layer: LayerStatistics) -> LayerSpectrum:
        U, S, _ = _whitened_svd(W, _input_moment(layer, W), layer.name)
        return _spectrum(layer, U, S.square() / max(stats.images, 1))

    return _each(model, stats, "svd_llm", solve, progress)


def afm(model: nn.Module, stats: Statistics, *, progress: Progress | None = None) -> Spectra:
    """AFM, atomic feature mimicking: principal components of the centred outputs, with its bias (Yu and Wu, AAAI 2023).

    `Cov[y] = U L Uᵀ`, `A = U_r`, `B = U_rᵀ W`, `b' = U_r U_rᵀ b + (I - U_r U_rᵀ) E[y] = b + (W - A B) E[x]`.
    Raises `InputError` where the statistics lack the input moment or the sum of the inputs.
    """

    def solve(W: Tensor, layer: LayerStatistics) -> LayerSpectrum:
        tokens = max(layer.tokens, 1)
        mean = _extra(layer, "input_sum", W) / tokens
        covariance = W @ (_input_moment(layer, W) / tokens - torch.outer(mean, mean)) @ W.mT  # [N, N], as published
        energies, U = _eigh((covariance + covariance.mT) / 2, layer.name)
        energies = energies.clamp_min(0) * (tokens / max(stats.images, 1))
        return _spectrum(layer, U, energies, mean=mean)

    return _each(model, stats, "afm", solve, progress)


BASELINES: dict[str, Baseline] = {"svd": svd, "asvd": asvd, "fwsvd": fwsvd, "svd_llm": svd_llm, "afm": afm}


def svd_llm_factors(W: Tensor, C: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The published chain for one rank: Cholesky, SVD, triangular solve; what `decompose` is timed against.

    `C = L Lᵀ`, `W L = U S Vᵀ`, `A = U_r S_r^{1/2} [N, r]`, `B = S_r^{1/2} V_rᵀ L⁻¹ [r, K]` for `W [N, K]`,
    `C [K, K]` (Wang et al., arXiv 2403.07378). Raises `NumericalError` where C holds NaN or Inf.
    """
    U, S, (Vh, L) = _whitened_svd(W, C, "the matrix")
    root = S[:r].sqrt()
    B = torch.linalg.solve_triangular(L, root[:, None] * Vh[:r], upper=False, left=False)  # root Vᵀ L⁻¹
    return U[:, :r] * root, B


def _whitened_svd(W: Tensor, C: Tensor, name: str) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    _finite(W, name)
    L, info = torch.linalg.cholesky_ex(_finite(C, name))
    if info.item() != 0:
        # The authors' repair, `C + (1e-6 - lambda_min) I`, with a floor where 1e-6 is below the rounding of C itself.
        values = torch.linalg.eigvalsh(C)
        floor = max(1e-6, float(values[-1]) * len(C) * torch.finfo(C.dtype).eps)
        shift = floor - min(float(values[0]), 0.0)
        L, info = torch.linalg.cholesky_ex(C + shift * torch.eye(len(C), dtype=C.dtype, device=C.device))
        if info.item() != 0:
            raise NumericalError(f"{name}: the input moment is not positive definite even after a shift of {shift:.1e}")
    U, S, Vh = torch.linalg.svd(W @ L, full_matrices=False)
    return U, S, (Vh, L)


def _each(
    model: nn.Module,
    stats: Statistics,
    objective: str,
    solve: Callable[[Tensor, LayerStatistics], LayerSpectrum],
    progress: Progress | None,
) -> Spectra:
    parts = read(model)
    check_fits(parts, stats)
    layers = {}
    for done, (name, layer) in enumerate(stats.layers.items(), 1):
        W = parts.linears[name].weight.detach().to("cpu", torch.float64)
        layers[name] = solve(_finite(W, name), layer)
        if progress is not None:
            progress(done, len(stats.layers))
    centred = any(spectrum.mean is not None for spectrum in layers.values())
    return Spectra(layers, objective, stats.fingerprint, centred)


def _extra(layer: LayerStatistics, key: str, like: Tensor) -> Tensor:
    value = getattr(layer, key, None)
    if value is None:
        raise InputError(f"{layer.name}: the statistics hold no {key}; calibrate(..., extras=({key!r},))")
    return _finite(value.to(like), layer.name)


def _input_moment(layer: LayerStatistics, like: Tensor) -> Tensor:
    """The full sum of x xᵀ: on the input side the statistics' own moment, otherwise an extra."""
    return _extra(layer, "moment" if layer.side == "input" else "input_moment", like)


def _finite(t: Tensor, name: str) -> Tensor:
    if not torch.isfinite(t).all():
        raise NumericalError(f"{name}: NaN or Inf in its weight or statistics; nothing was factorised")
    return t


def _svd(M: Tensor, name: str) -> tuple[Tensor, Tensor]:
    U, S, _ = torch.linalg.svd(_finite(M, name), full_matrices=False)
    return U, S


def _eigh(G: Tensor, name: str) -> tuple[Tensor, Tensor]:
    values, U = torch.linalg.eigh(_finite(G, name))
    return values.flip(0), U.flip(1)


def _spectrum(
    layer: LayerStatistics, P: Tensor, energies: Tensor, Q: Tensor | None = None, mean: Tensor | None = None
) -> LayerSpectrum:
    n = min(layer.in_features, layer.out_features)
    return LayerSpectrum(
        name=layer.name,
        in_features=layer.in_features,
        out_features=layer.out_features,
        side="output",
        energies=energies[:n].contiguous(),
        P=P[:, :n].contiguous(),
        Q=(P.mT if Q is None else Q)[:n].contiguous(),
        mean=mean,
    )
