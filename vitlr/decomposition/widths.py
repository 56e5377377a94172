"""What every width costs a linear that reads something narrower, and the weights that make up for what is gone.

The second linear of an MLP reads h = the hidden neurons, the projection of an attention o = the heads side by side.
With M and Σ of `HiddenMoments` and F the gradient moment of its output (`objectives`), removing all but k costs
`½ E[(gᵀδ)²] = tr(F (W − V E_k) Σ (W − V E_k)ᵀ)` in the unit of the low-rank energies: nats per image.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vitlr.calibration.statistics import LayerStatistics
from vitlr.decomposition.hidden_moments import HiddenMoments
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.options import Decomposition
from vitlr.decomposition.ranked_widths import eliminate_ranked, spread
from vitlr.decomposition.spectra import LayerSpectrum
from vitlr.errors import InputError, NumericalError
from vitlr.ops.linalg.eigenproblems import solve
from vitlr.ops.linalg.elimination import compensate, eliminate_alone, eliminate_groups

S = TypeVar("S", bound="WidthSpectrum")


class Solved(NamedTuple):
    """What takes long to find of a `WidthSpectrum`."""

    order: Tensor
    """`[D]`, the most important first."""
    errors: Tensor
    """The loss of every width, `[D + 1]`."""
    second: dict[int, Tensor]
    """By width, the loss of every rank of the second linear, where it is known."""


@dataclass(frozen=True, eq=False, kw_only=True)
class WidthSpectrum:
    """All widths of what `second` reads: entries in `order [D]`, the most important first, `errors [D + 1]` by width.

    Sets of entries are nested: `order[:h]` is kept at width h, at a loss of `errors[h]`. `compensated` says whether the
    second linear makes up for what is gone, `group` how many neighbours go together. Holds what it was made from, so
    that it gives weights for every width.
    """

    name: str
    kind: str
    first: tuple[str, ...]
    second: str
    order: Tensor
    errors: Tensor
    compensated: bool
    group: int
    free: bool
    weight: Tensor = field(repr=False)  # W₂ [N, D]
    bias: Tensor | None = field(repr=False)
    metric: Tensor = field(repr=False)  # F [N, N]
    moments: HiddenMoments = field(repr=False)
    step: int = 0  # at the spread multiples of which the ranks of the second linear are known
    _second: dict[int, Tensor] = field(default_factory=dict, repr=False)

    factored = True
    trims_last = False

    @classmethod
    def solved(
        cls: type[S],
        name: str,
        kind: str,
        first: tuple[str, ...],
        linear: nn.Module,
        layer: LayerStatistics,
        objective: Objective,
        options: Decomposition,
        *,
        step: int = 0,
        group: int = 1,
        known: Solved | None = None,
        **own: Any,
    ) -> S:
        """All widths of what `linear`, the second one, reads. Raises `NumericalError` naming the MLP or attention.

        With a `step` the ranks at those of its multiples that are offered with ranks are known as well, at little cost.
        What is `known` already is taken as it is.
        """
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach().cpu()
        bias = None if linear.bias is None else linear.bias.detach().cpu()
        moments = HiddenMoments(layer, objective.images, bias is not None, objective.by_image, options.ridge)
        metric, free = _metric(layer, weight.double(), objective, moments)
        ranked = spread(choices(weight.shape[1], step))[:-1] if step and options.compensate and group == 1 else []
        try:
            if known is None:
                known = _eliminated(weight.double(), metric, moments, options.compensate, group, ranked)
        except (NumericalError, torch.linalg.LinAlgError) as cause:
            what = "MLP" if kind == "mlp" else "attention"
            few = layer.tokens <= weight.shape[1]
            better = f"on more images ({layer.tokens} tokens, {weight.shape[1]} neurons)" if few else "in float32"
            raise NumericalError(f"{what} {name}: {cause}; calibrate again {better}, or raise ridge=") from cause
        order, errors, second = known
        return cls(
            name=name,
            kind=kind,
            first=first,
            second=layer.name,
            order=order,
            errors=torch.zeros_like(errors) if free else errors,
            compensated=options.compensate,
            group=group,
            free=free,
            weight=weight,
            bias=bias,
            metric=metric,
            moments=moments,
            step=step,
            _second={width: torch.zeros_like(lost) if free else lost for width, lost in second.items()},
            **own,
        )

    @property
    def solution(self) -> Solved:
        """What it would take long to find again."""
        return Solved(self.order, self.errors, self._second)

    @property
    def full_width(self) -> int:
        """D, how many there are."""
        return len(self.order)

    def fits(self, options: Decomposition, step: int) -> bool:
        """Whether solving with these options would give the same, ranks at multiples of a step included."""
        same = (self.compensated, self.moments.ridge) == (options.compensate, options.ridge)
        return same and step in (0, self.step)

    def keep(self, width: int) -> Tensor:
        """What is kept at a width, in ascending order. Raises `InputError` for a width outside 1 … D."""
        if not 1 <= width <= self.full_width:
            raise InputError(f"{self.name}: width {width}, expected 1 to {self.full_width}")
        return self.order[:width].sort().values

    def choices(self, step: int) -> list[int]:
        """Multiples of the step below the full width, and that."""
        return choices(self.full_width, step)

    def extra(self, width: int, quantity: str) -> float:
        """What a width costs besides its linears' weights and biases, against the full one."""
        return 0.0

    def weights(self, width: int) -> tuple[Tensor, Tensor | None]:
        """W₂ `[N, h]` and b₂ on what is kept, in float64: what was removed is folded in by ridge regression.

        `h_r ≈ A h_k + c`: `W₂ ← W₂,k + W₂,r A`, `b₂ ← b₂ + W₂,r c`; without a bias c is 0.
        """
        keep, W = self.keep(width), self.weight.double()
        bias = None if self.bias is None else self.bias.double()
        if not self.compensated or width == self.full_width:
            return W[:, keep], bias
        V = compensate(W, self.moments.covariance(), keep)
        if bias is not None:
            mean = self.moments.mean
            bias = bias + W @ mean - V @ mean[keep]
        return V, bias

    def second_spectrum(self, width: int, V: Tensor | None = None) -> LayerSpectrum:
        """The low-rank spectrum of the second linear as it is at this width (see `vitlr.decomposition.ranks`).

        V are its `weights` there, where they are at hand.
        """
        V = self.weights(width)[0] if V is None else V
        keep = self.keep(width)
        energies, P, Q = solve(V @ self.moments.M()[keep[:, None], keep] @ V.mT, self.metric)
        if self.free:
            energies = torch.zeros_like(energies)
        return LayerSpectrum(self.second, width, len(V), "output", energies, P, Q)

    def rank_errors(self, name: str, width: int) -> Tensor | None:
        """Loss of every rank of the second linear at a width below the full one, solved once; else None."""
        if name != self.second or width == self.full_width:
            return None
        if width not in self._second:
            self._second[width] = self.second_spectrum(width).errors()
        return self._second[width]


def choices(full_width: int, step: int) -> list[int]:
    """Multiples of the step below the full width, and that."""
    return [*range(step, full_width, step), full_width]


def _metric(layer: LayerStatistics, W: Tensor, objective: Objective, moments: HiddenMoments) -> tuple[Tensor, bool]:
    """F `[N, N]` of the second linear's output, and whether nothing depends on it."""
    one = torch.eye(len(W), dtype=torch.float64)
    if not objective.by_gradient:
        return one, False
    if layer.side == "input":  # measured as H = Wᵀ S W, and no S
        raise InputError(f"layer {layer.name} has more outputs than inputs: its widths need objective='output'")
    F = objective.F(layer, W)
    assert F is not None
    if not bool(F.any()):
        return one, True
    F = objective.damped(F, W, layer.side)
    if objective.by_image:
        # Half the mean of ‖P‖² over images and draws, which is the trace of F where M has a trace of 1.
        size = moments.traces[1] / (2 * objective.images * objective.samples)
        F = F * (1 + objective.damping) * size / F.trace()
    return F, False


def _eliminated(
    W: Tensor, metric: Tensor, moments: HiddenMoments, compensated: bool, group: int, ranked: Collection[int]
) -> Solved:
    """The order in which neurons stay, the loss of every width, and that of every rank at some of them."""
    second: dict[int, Tensor] = {}
    L, info = torch.linalg.cholesky_ex(metric + 1e-12 * metric.diagonal().mean() * torch.eye(len(W)))
    if int(info):
        raise NumericalError("the gradient moment of its output is not positive semidefinite")
    G = L.mT @ W
    if not compensated:
        order, errors = eliminate_alone(moments.M(), G, group)
    elif group > 1:
        order, errors = eliminate_groups(moments.covariance(), G, group)
    else:
        order, errors, second = eliminate_ranked(moments, G, ranked)
    if not torch.isfinite(errors).all():
        raise NumericalError("its losses hold NaN or Inf")
    return Solved(order, errors, second)
