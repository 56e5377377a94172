"""What every width of every MLP costs, and the weights that go with it: the analogue of a spectrum over ranks.

The second linear of an MLP reads h = the hidden neurons. With `M = Σ h hᵀ` per image, `Σ = M − its mean part + ridge`,
and F the gradient moment of its output (`vitlr.moments`, damped), removing all neurons but k costs
`½ E[(gᵀδ)²] = tr(F (W − V E_k) Σ (W − V E_k)ᵀ)` in the unit of the low-rank energies: nats per image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from vitlr.anatomy.mlps import SUPPORTED, Mlp, find_mlps
from vitlr.calibration.options import GRADIENT_OBJECTIVES
from vitlr.calibration.statistics import LayerStatistics, Statistics
from vitlr.decomposition.objectives import damped, pair
from vitlr.decomposition.spectra import LayerSpectrum
from vitlr.errors import InputError, NumericalError
from vitlr.ops.linalg.eigenproblems import solve
from vitlr.ops.linalg.elimination import compensate, eliminate, eliminate_alone, eliminate_groups

_TINY = torch.finfo(torch.float64).tiny
RIDGE = 1e-3  # relative to the mean variance of a hidden neuron; chosen on held-out calibration images (docs/method.md)


@dataclass(eq=False)
class WidthSpectrum:
    """All widths of one MLP at once: neurons in `order [D]`, the most important first, and `errors [D + 1]` by width.

    Sets of neurons are nested: `order[:h]` is kept at width h, at a loss of `errors[h]`. `compensated` says whether the
    second linear makes up for what is gone. Holds what it was made from, so that it gives weights for every width.
    """

    name: str
    first: tuple[str, ...]
    second: str
    packed: bool
    order: Tensor
    errors: Tensor
    compensated: bool
    ridge: float
    layer: LayerStatistics = field(repr=False)
    images: int = field(repr=False)
    weight: Tensor = field(repr=False)  # W₂ [N, D]
    bias: Tensor | None = field(repr=False)
    metric: Tensor = field(repr=False)  # F [N, N]
    free: bool = False
    by_image: bool = False  # objective "fisher"
    group: int = 1  # so many neighbours go together
    factored: bool = True  # a narrower width may have ranks as well
    trims_last: bool = False  # its last linear loses outputs
    _second: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def full_width(self) -> int:
        """D, the number of hidden neurons."""
        return len(self.order)

    def keep(self, width: int) -> Tensor:
        """The neurons kept at a width, in ascending order. Raises `InputError` for a width outside 1 … D."""
        if not 1 <= width <= self.full_width:
            raise InputError(f"{self.name}: width {width}, expected 1 to {self.full_width}")
        return self.order[:width].sort().values

    @property
    def kind(self) -> str:
        """What gets narrower, as a `WidthPlan` says it."""
        return "mlp"

    def choices(self, step: int) -> list[int]:
        """Multiples of the step below the full width, and that."""
        return [*range(step, self.full_width, step), self.full_width]

    def shape(self, name: str, full: tuple[int, int], width: int) -> tuple[int, int]:
        """(N, K) of one of its linears at a width; `full` is what it has now."""
        return (full[0], width) if name == self.second else (width * (2 if self.packed else 1), full[1])

    def rows(self, keep: Tensor) -> dict[str, Tensor]:
        """The rows of every first linear that stay with the neurons `keep`."""
        rows = torch.cat([keep, keep + self.full_width]) if self.packed else keep
        return dict.fromkeys(self.first, rows)

    def extra(self, width: int, quantity: str) -> float:
        """What a width costs besides its linears' weights and biases, against the full one."""
        return 0.0

    def weights(self, width: int) -> tuple[Tensor, Tensor | None]:
        """W₂ `[N, h]` and b₂ on the kept neurons, in float64: what was removed is folded in by ridge regression.

        `h_r ≈ A h_k + c`: `W₂ ← W₂,k + W₂,r A`, `b₂ ← b₂ + W₂,r c`; without a bias c is 0.
        """
        keep, W = self.keep(width), self.weight.double()
        bias = None if self.bias is None else self.bias.double()
        if not self.compensated or width == self.full_width:
            return W[:, keep], bias
        V = compensate(W, self.covariance(), keep)
        if bias is not None:
            mean = self._mean()
            bias = bias + W @ mean - V @ mean[keep]
        return V, bias

    def second_spectrum(self, width: int) -> LayerSpectrum:
        """The low-rank spectrum of the second linear as it is at this width (see `vitlr.decomposition.ranks`)."""
        V, _ = self.weights(width)
        keep = self.keep(width)
        energies, P, Q = solve(V @ self.moment()[keep][:, keep] @ V.mT, self.metric)
        if self.free:
            energies = torch.zeros_like(energies)
        return LayerSpectrum(self.second, width, len(V), "output", energies, P, Q)

    def second_errors(self, width: int) -> Tensor:
        """`second_spectrum(width).errors()`, solved once."""
        if width not in self._second:
            self._second[width] = self.second_spectrum(width).errors()
        return self._second[width]

    def covariance(self) -> Tensor:
        """Σ `[D, D]`: the moment about the mean where a bias can carry it, with its ridge."""
        covariance = self.moment(centred=self.bias is not None)
        level = covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny)
        covariance.diagonal().add_(self.ridge * level)
        return covariance

    def moment(self, centred: bool = False) -> Tensor:
        """M `[D, D]` of one image: `Σ_tokens h hᵀ`, or with `by_image` half that and half `P Pᵀ`, `P = Σ_tokens h gᵀ`.

        `centred` puts `h − mean h` in the place of h. The halves are scaled so that either has a trace of ½ about the
        mean (about zero without a bias): their sizes are in F.
        """
        if not self.by_image:
            return self._tokens(centred)
        of_tokens, of_images = self._traces
        return self._tokens(centred).div_(2 * of_tokens).add_(self._images(centred), alpha=1 / (2 * of_images))

    @cached_property
    def _traces(self) -> tuple[float, float]:
        """Of both halves, about the mean where a bias can carry it."""
        centred = self.bias is not None
        of_tokens, of_images = (float(half(centred).trace()) for half in (self._tokens, self._images))
        return max(of_tokens, _TINY), max(of_images, _TINY)

    def _tokens(self, centred: bool) -> Tensor:
        moment = self._sum("input_moment") / max(self.images, 1)
        if centred:
            mean = self._mean()
            moment -= torch.outer(mean, mean) * (self.layer.tokens / max(self.images, 1))
        return moment

    def _images(self, centred: bool) -> Tensor:
        """`Σ_images P Pᵀ`; about the mean, `P − mean ḡᵀ` stands for P."""
        moment = self._sum("image_input_moment")
        if centred:
            mean, cross = self._mean(), self._sum("image_input_sum")
            moment = moment - torch.outer(cross, mean) - torch.outer(mean, cross)
            moment += torch.outer(mean, mean) * self._sum("image_output_gradient")
        return moment

    def _mean(self) -> Tensor:
        return self._sum("input_sum") / max(self.layer.tokens, 1)

    def _sum(self, key: str) -> Tensor:
        return self.layer.sum(key).to(self.order.device, torch.float64)


Spectrum = TypeVar("Spectrum", bound=WidthSpectrum)


def solve_widths(
    model: nn.Module,
    stats: Statistics,
    objective: str | None = None,
    *,
    compensate: bool = True,
    ridge: float = RIDGE,
    damping: float = 0.1,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, WidthSpectrum]:
    """The width spectra of all MLPs that the statistics cover, by name, in float64.

    Needs the hidden moments of `calibrate(..., hidden=True)`, and `objective` "loss", "fisher" or "output". `ridge` is
    relative to the mean variance of a hidden neuron, `damping` to the mean eigenvalue of the output gradients' moment.
    Raises `InputError` where the statistics hold no hidden moments or no MLP is recognised, `NumericalError` naming the
    MLP.
    """
    objective = objective or stats.default_objective
    check_options(objective, ridge)
    measured = _measured(model, stats, objective)
    found: dict[str, WidthSpectrum] = {}
    for name, mlp in measured.items():
        found[name] = solved(prepared(mlp, stats, objective, compensate, ridge, damping))
        if progress is not None:
            progress(len(found), len(measured))
    return found


def check_options(objective: str, ridge: float) -> None:
    """Raise `InputError` for options that no statistics could serve."""
    if objective == "normalized":  # its unit is another one than that of the hidden moments
        raise InputError("objective='normalized' weighs whole images, hidden moments are of tokens; use 'loss'")
    if not 0 < ridge < float("inf"):
        raise InputError(f"ridge={ridge}, expected a number above 0: hidden neurons may be copies of each other")


def _measured(model: nn.Module, stats: Statistics, objective: str) -> Mapping[str, Mlp]:
    """The MLPs whose linears are all dense and measured.

    Where the second one has more outputs than inputs (an MLP made narrower than the embedding before), gradients were
    measured at its inputs, `H = Wᵀ S W` without S: it keeps its width.
    """
    found = find_mlps(model)
    measured = {name: mlp for name, mlp in found.items() if all(linear in stats.layers for linear in mlp.linears)}
    if not measured:
        raise InputError(f"none of the {len(found)} MLPs recognised was measured; supported: {SUPPORTED}")
    if objective in GRADIENT_OBJECTIVES:
        narrow = {name for name, mlp in measured.items() if stats.layers[mlp.linears[-1]].side == "input"}
        if narrow == set(measured):
            raise InputError(
                f"the second linear of {min(narrow)} has more outputs than inputs, as have all others: "
                "their widths need objective='output'"
            )
        measured = {name: mlp for name, mlp in measured.items() if name not in narrow}
    for name, mlp in measured.items():
        if stats.layers[mlp.linears[-1]].input_moment is None:
            raise InputError(
                f"these statistics hold no hidden moments ({name}); calibrate with hidden=True, which pruning needs"
            )
    return measured


def prepared(
    mlp: Mlp, stats: Statistics, objective: str, compensated: bool, ridge: float, damping: float
) -> WidthSpectrum:
    """The spectrum before it is solved."""
    layer, fc2 = stats.layers[mlp.linears[-1]], mlp.fc2
    assert isinstance(fc2, nn.Linear)
    N, D = fc2.weight.shape
    F: Tensor | None = None
    if objective in GRADIENT_OBJECTIVES:
        if layer.side == "input":  # measured as H = Wᵀ S W, and no S
            raise InputError(f"layer {layer.name} has more outputs than inputs: its widths need objective='output'")
        W = fc2.weight.detach().to("cpu", torch.float64)
        F = pair(layer, W, stats, objective)[1]
    free = F is not None and not bool(F.any())
    F = torch.eye(N, dtype=torch.float64) if F is None or free else damped(F, W, layer.side, damping, objective)
    nothing = torch.arange(D), torch.zeros(D + 1, dtype=torch.float64)
    weight = fc2.weight.detach().cpu()
    bias = None if fc2.bias is None else fc2.bias.detach().cpu()
    first, second = mlp.linears[:-1], mlp.linears[-1]
    spectrum = WidthSpectrum(
        mlp.name, first, second, mlp.packed, *nothing, compensated, ridge, layer, stats.images, weight, bias, F, free
    )
    spectrum.by_image = objective == "fisher"
    if spectrum.by_image and not free:
        # Half the mean of ‖P‖² over images and draws, which is the trace of F where M has a trace of 1.
        size = spectrum._traces[1] / (2 * max(stats.images, 1) * stats.samples)
        spectrum.metric = F * (1 + damping) * size / F.trace()
    return spectrum


def solved(spectrum: Spectrum) -> Spectrum:
    """Order and errors of what `prepared` made; `NumericalError` naming it."""
    try:
        return _solved(spectrum)
    except (NumericalError, torch.linalg.LinAlgError) as cause:
        what = "MLP" if spectrum.kind == "mlp" else "attention"
        raise NumericalError(f"{what} {spectrum.name}: {cause}; calibrate again in float32, or raise ridge=") from cause


def _solved(spectrum: Spectrum) -> Spectrum:
    W = spectrum.weight.double()
    L, info = torch.linalg.cholesky_ex(spectrum.metric + 1e-12 * spectrum.metric.diagonal().mean() * torch.eye(len(W)))
    if int(info):
        raise NumericalError("the gradient moment of its output is not positive semidefinite")
    G = L.mT @ W
    if not spectrum.compensated:
        spectrum.order, spectrum.errors = eliminate_alone(spectrum.moment(), G, spectrum.group)
    elif spectrum.group > 1:
        spectrum.order, spectrum.errors = eliminate_groups(spectrum.covariance(), G, spectrum.group)
    else:
        spectrum.order, spectrum.errors = eliminate(spectrum.covariance(), G)
    if not torch.isfinite(spectrum.errors).all():
        raise NumericalError("its losses hold NaN or Inf")
    if spectrum.free:
        spectrum.errors = torch.zeros_like(spectrum.errors)
    return spectrum
