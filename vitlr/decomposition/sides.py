"""The two sides of the loss of an error E in a linear's weight, `tr(S E C Eᵀ)`: in full, about the mean, damped."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vitlr.calibration.statistics import LayerStatistics
from vitlr.decomposition.objectives import Objective
from vitlr.errors import NumericalError
from vitlr.ops.linalg.rounding import Side

DAMPING = 0.5  # of both sides, of their mean: the same bytes lose least from 0.4 to 1 (docs/method.md)
PRICED = 0.1  # the same in what errors are said to cost: ranks and widths count their losses so (docs/method.md)
_OUTLIER = 10  # times the median: no entry counts for more in the mean, or one huge input would damp all others
_LEAST = 0.1  # of the plain mean, where most entries are nearly nothing: sums in float32 are not exact to that
_STILL = 1e-6  # of the moment about zero
_NOTHING = 1e-12  # of every direction where none was seen


class Entries(NamedTuple):
    """What errors of each entry of a side count."""

    D: Tensor
    """In the metric that is rounded by, once they are made up for."""
    spread: Tensor
    """What making up for errors multiplies the variances of the rounding errors by."""
    price: Tensor
    """What such an error counts in nats, where D counts it in the metric that is rounded by."""


@dataclass(frozen=True, eq=False)
class Sides:
    """S `[N, N]` of a linear's output and C `[K, K]` of its inputs in float64, made from the sums when asked for.

    `rows` and `columns` name the outputs and inputs that are left of the layer, None for all: a narrower layer sees the
    same moments, fewer of them. C is about the mean of the inputs where a bias carries that. A factor B is seen through
    A `[N, r]`, `S ← Aᵀ S A`, and A sees its inputs through B `[r, K]`, `C ← B C Bᵀ`.
    """

    layer: LayerStatistics = field(repr=False)
    objective: Objective
    has_bias: bool
    rows: Tensor | None = None
    columns: Tensor | None = None
    A: Tensor | None = field(default=None, repr=False)
    B: Tensor | None = field(default=None, repr=False)
    most: float = float("inf")
    """Medians of the inputs' squares that those of one input count at the most."""

    def among(self, rows: Tensor | None, columns: Tensor | None) -> Sides:
        """Those of the same layer with these outputs and inputs alone."""
        return replace(self, rows=rows, columns=columns)

    def through(self, *, A: Tensor | None = None, B: Tensor | None = None) -> Sides:
        """Those of the factor B of `A B`, seen through A, or of the factor A, which reads what B makes."""
        return replace(self, A=A, B=B)

    def moments(self, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
        """S and C, nats an image, damped."""
        S, C = (_damped(M, damping * _level(M)) for M in (self._outputs(), self._inputs()))
        return _seen(S, self.A), _seen(C, None if self.B is None else self.B.mT)

    def factored(self) -> tuple[Side, Side]:
        """Both as rounding needs them. Raises `NumericalError` naming the layer for moments that are none."""
        S, C = self.moments()
        return self._side("outputs' gradients", S), self._side("inputs", C)

    def of_outputs(self) -> Entries:
        """What errors count by output. Raises `NumericalError` naming the layer for a moment that is none."""
        return self._entries("outputs' gradients", self._outputs(), self.A)

    def of_inputs(self) -> Entries:
        """What errors count by input. Raises `NumericalError` naming the layer for a moment that is none."""
        return self._entries("inputs", self._inputs(), None if self.B is None else self.B.mT)

    def mean(self) -> Tensor:
        """Of the inputs, in float64."""
        mean = self.layer.sum("input_sum").cpu().double() / max(self.layer.tokens, 1)
        return mean if self.columns is None else mean[self.columns]

    def _outputs(self) -> Tensor:
        """S undamped, of what is left; a new tensor, free to be written over."""
        layer, objective = self.layer, self.objective
        if not objective.by_gradient:
            return torch.eye(layer.out_features if self.rows is None else len(self.rows), dtype=torch.float64)
        sums = layer.sum("gradient" if layer.side == "output" else "output_gradient")
        return objective.of_gradients(_left(sums, self.rows), None, layer.tokens)

    def _inputs(self) -> Tensor:
        """C likewise."""
        layer = self.layer
        C = _left(layer.sum("input_moment" if layer.side == "output" else "moment"), self.columns)
        if self.has_bias:
            total = _left(layer.sum("input_sum"), self.columns)
            about = torch.addr(C, total, total, alpha=-1 / max(layer.tokens, 1))
            # The same input for all images, a class token's for one: what is left is the rounding of its sums.
            C = about if about.trace() > _STILL * C.trace() else torch.zeros_like(about)
        return self.objective.of_activations(C if self.most == float("inf") else _calm(C, self.most))

    def _entries(self, what: str, M: Tensor, through: Tensor | None) -> Entries:
        level = _level(M)
        more = (DAMPING - PRICED) * level  # times 1: what errors are said to cost without
        side = self._side(what, _seen(_damped(M, DAMPING * level), through))
        return Entries(*side.by_entry(more if through is None else more * through.mT @ through))

    def _side(self, what: str, M: Tensor) -> Side:
        M = M if M.any() else _NOTHING * torch.eye(len(M))
        try:
            return Side.of(M, 0.0)
        except NumericalError:  # sums in float32 of a few tokens, one entry far above all others
            pass
        try:
            return Side.of(M, DAMPING)
        except NumericalError as cause:
            raise NumericalError(
                f"layer {self.layer.name}, moment of the {what}: {cause}; calibrate again in float32"
            ) from cause


def _left(M: Tensor, entries: Tensor | None) -> Tensor:
    if entries is not None:
        M = M[entries[:, None], entries] if M.ndim == 2 else M[entries]
    return M.double()


def _calm(M: Tensor, most: float) -> Tensor:
    """M with large entries scaled down, with all that they have in common with others."""
    diagonal = M.diagonal()
    by = (most * diagonal.median() / diagonal.clamp_min(torch.finfo(M.dtype).tiny)).clamp(max=1).sqrt()
    return M * torch.outer(by, by) if diagonal.median() > 0 else M


def _damped(M: Tensor, by: Tensor) -> Tensor:
    M.diagonal().add_(by)
    return M


def _seen(M: Tensor, through: Tensor | None) -> Tensor:
    return M if through is None else through.mT @ M @ through


def _level(M: Tensor) -> Tensor:
    """The mean of the diagonal, in which no entry counts for more than some medians."""
    diagonal = M.diagonal()
    return torch.maximum(diagonal.clamp(max=_OUTLIER * diagonal.median()).mean(), _LEAST * diagonal.mean())
