"""The moments of what a second linear reads: hidden neurons of an MLP, or the heads of an attention side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vitlr.calibration.statistics import LayerStatistics
from vitlr.errors import NumericalError

_STILL = 1e-6  # of the moment about zero
_FAINT = 1e-2  # likewise: below it the rounding of sums in float32 may be more than a ridge
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
        ridge = self.ridge * covariance.diagonal().mean().clamp_min(_TINY)
        covariance = self._rounded(covariance, ridge)
        covariance.diagonal().add_(ridge)
        return covariance

    def _rounded(self, covariance: Tensor, ridge: Tensor) -> Tensor:
        """Σ without what is negative in it, where the means are nearly all there is and the ridge does not outdo that.

        Sums in float32 are rounded relative to the means: what that leaves of a small variance may have either sign.
        """
        D = len(covariance)
        few = self.layer.tokens <= D  # of these nothing is known in most directions
        if not self.with_bias or few or float(covariance.trace()) > _FAINT * float(self.M().trace()):
            return covariance
        if not int(torch.linalg.cholesky_ex(covariance + ridge * torch.eye(D)).info):
            return covariance
        energies, Q = torch.linalg.eigh(covariance)
        return (Q * energies.clamp_min(0)) @ Q.mT

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
        M = self._sum("input_moment") * self._of_tokens
        if self.by_image:
            M.add_(self._sum("image_input_moment"), alpha=self._of_images)
        if centred:
            U, S = self.about_mean
            M.addmm_(U, S @ U.mT, alpha=-1)
        return M

    @cached_property
    def about_mean(self) -> tuple[Tensor, Tensor]:
        """U `[D, k]` and S `[k, k]`: M about zero is M about the mean and `U S Uᵀ`."""
        per_image = self._of_tokens * self.layer.tokens
        if not self.by_image:
            return self.mean[:, None], torch.full((1, 1), per_image, dtype=torch.float64)
        squares = float(self._sum("image_output_gradient")) * self._of_images
        S = torch.tensor([[per_image - squares, self._of_images], [self._of_images, 0.0]], dtype=torch.float64)
        return torch.stack([self.mean, self._sum("image_input_sum")], 1), S

    @cached_property
    def traces(self) -> tuple[float, float]:
        """Of both sums, over an image and over all of them, about the mean where a bias can carry it."""
        mean, layer = self.mean, self.layer
        of_tokens = float(self._sum("input_moment").trace()) / self.images
        of_images = float(self._sum("image_input_moment").trace())
        if self.with_bias:  # with ḡ = Σ_tokens g, `P − mean ḡᵀ` stands for P
            square = float(mean @ mean)
            of_tokens -= square * layer.tokens / self.images
            of_images -= 2 * float(mean @ self._sum("image_input_sum"))
            of_images += square * float(self._sum("image_output_gradient"))
        return max(of_tokens, _TINY), max(of_images, _TINY)

    @cached_property
    def _of_tokens(self) -> float:
        """What M holds of `Σ h hᵀ`."""
        return 1 / self.images / (2 * self.traces[0] if self.by_image else 1)

    @cached_property
    def _of_images(self) -> float:
        """What M holds of `Σ P Pᵀ`."""
        return 1 / (2 * self.traces[1])

    def _sum(self, key: str) -> Tensor:
        return self.layer.sum(key).to("cpu", torch.float64)
