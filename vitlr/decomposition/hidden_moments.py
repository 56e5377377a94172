"""The moments of what a second linear reads: hidden neurons of an MLP, or the heads of an attention side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vitlr.calibration.statistics import LayerStatistics
from vitlr.errors import NumericalError

_STILL = 1e-6  # of the moment about zero
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class HiddenMoments:
    """M, Σ and mean of h `[D]` in float64, made from the sums when asked for: a layer's take 8 D² bytes each.

    `with_bias` says that a bias can carry the mean of h, so that only deviations from it count; `by_image` that the
    tokens of an image are taken together; `ridge` what Σ gains, relative to the mean variance of a neuron.
    """

    layer: LayerStatistics = field(repr=False)
    images: int
    with_bias: bool
    by_image: bool
    ridge: float

    @property
    def mean(self) -> Tensor:
        """Of h, over all tokens, `[D]`."""
        return self._sum("input_sum") / max(self.layer.tokens, 1)

    def covariance(self) -> Tensor:
        """Σ `[D, D]`: M about the mean where a bias can carry it, with its ridge."""
        self._check_varies()
        covariance = self.M(centred=self.with_bias)
        level = covariance.diagonal().mean().clamp_min(_TINY)
        covariance.diagonal().add_(self.ridge * level)
        return covariance

    def _check_varies(self) -> None:
        """Raise `NumericalError` where nothing is left about the mean but what its sums in float32 have rounded."""
        squares = self._sum("input_moment").diagonal()
        about = squares - self.mean.square() * self.layer.tokens if self.with_bias else squares
        if float(about.sum()) <= _STILL * float(squares.sum()):
            raise NumericalError("what it reads is the same for all images, dead or constant")

    def M(self, centred: bool = False) -> Tensor:
        """M `[D, D]` of one image: `Σ_tokens h hᵀ`, or with `by_image` half that and half `P Pᵀ`, `P = Σ_tokens h gᵀ`.

        `centred` puts `h − mean h` in the place of h. The halves are scaled so that either has a trace of ½ about the
        mean (about zero without a bias): their sizes are in F.
        """
        if not self.by_image:
            return self._tokens(centred)
        of_tokens, of_images = self.traces
        return self._tokens(centred).div_(2 * of_tokens).add_(self._images(centred), alpha=1 / (2 * of_images))

    @cached_property
    def traces(self) -> tuple[float, float]:
        """Of both halves, about the mean where a bias can carry it."""
        of_tokens, of_images = (float(half(self.with_bias).trace()) for half in (self._tokens, self._images))
        return max(of_tokens, _TINY), max(of_images, _TINY)

    def _tokens(self, centred: bool) -> Tensor:
        moment = self._sum("input_moment") / self.images
        if centred:
            moment -= torch.outer(self.mean, self.mean) * (self.layer.tokens / self.images)
        return moment

    def _images(self, centred: bool) -> Tensor:
        """`Σ_images P Pᵀ`; about the mean, `P − mean ḡᵀ` stands for P."""
        moment = self._sum("image_input_moment")
        if centred:
            mean, cross = self.mean, self._sum("image_input_sum")
            moment = moment - torch.outer(cross, mean) - torch.outer(mean, cross)
            moment += torch.outer(mean, mean) * self._sum("image_output_gradient")
        return moment

    def _sum(self, key: str) -> Tensor:
        return self.layer.sum(key).to("cpu", torch.float64)
