"""The two moments behind every objective: M, how large the directions of a layer are, F, how much each of them matters.

    side     W_r      M               F for "loss"             F else
    output   Π W      G = Σ y yᵀ      S = Σ g gᵀ               1
    input    (W Π)    C = Σ x xᵀ      H = Σ (Wᵀg)(Wᵀg)ᵀ        Wᵀ W

"loss" takes the tokens of an image as independent. "fisher" does not: the loss of an image moves by `tr((1 − Π) P)`,
`P = Σ_tokens y gᵀ`. `Σ_images P Pᵀ` and `Σ_images Pᵀ P` are the Kronecker factors nearest to the second moment of P
after one power iteration from the identity (as Shampoo's are: Morwani et al., arXiv 2406.17748). Its M and F are the
means of these and of the ones above, all scaled to one trace.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitlr.calibration.options import GRADIENT_OBJECTIVES
from vitlr.calibration.statistics import LayerStatistics, Statistics
from vitlr.decomposition.options import Decomposition
from vitlr.decomposition.spectra import Spectra
from vitlr.errors import InputError
from vitlr.ops.linalg.eigenproblems import DAMPING


@dataclass(frozen=True)
class Objective:
    """What counts as a loss, and over how many images and draws of targets its sums were taken.

    `centred` measures deviations from the mean; `damping` is added to F, relative to its mean eigenvalue.
    """

    name: str
    images: int
    samples: int
    centred: bool = False
    damping: float = DAMPING

    @classmethod
    def of(cls, stats: Statistics, options: Decomposition, spectra: Spectra | None = None) -> Objective:
        """The objective asked for, by default the first that was measured, or that of `spectra` where there are some.

        Raises `InputError` where the statistics do not hold it, and where spectra are of others or of other options.
        """
        images = max(stats.images, 1)
        if spectra is not None:
            own = (spectra.objective, spectra.centred, spectra.damping)
            asked = (options.objective, options.centred, options.damping)
            same = all(mine in (None, theirs) for mine, theirs in zip(asked, own, strict=True))
            if spectra.fingerprint != stats.fingerprint or not same:
                raise InputError(
                    f"these spectra ({spectra.objective}, centred={spectra.centred}, damping={spectra.damping}) are of "
                    "other statistics or other options; leave spectra= out"
                )
            return cls(spectra.objective, images, stats.samples, spectra.centred, spectra.damping)
        name = options.objective or stats.default_objective
        damping = DAMPING if options.damping is None else options.damping
        if name != "output" and name not in stats.objectives:
            raise InputError(
                f"these statistics hold {', '.join(stats.objectives)}, not {name!r}; calibrate with objective={name!r}"
            )
        return cls(name, images, stats.samples, bool(options.centred), damping)

    @property
    def by_gradient(self) -> bool:
        """Whether F comes from gradients of the loss, and the unit is nats per image."""
        return self.name in GRADIENT_OBJECTIVES

    @property
    def by_image(self) -> bool:
        """Whether the tokens of an image are taken together."""
        return self.name == "fisher"

    def M(self, layer: LayerStatistics, W: Tensor) -> Tensor:
        """How large the directions on the layer's smaller side are, `[n, n]`, of W's dtype and device."""
        if self.by_image:
            return self.of_activations(layer.sum("moment").to(W), layer.sum("image_moment").to(W))
        M = layer.sum("normalized" if self.name == "normalized" else "moment").to(W)
        if self.centred:
            total = layer.sum("input_sum").to(W)
            total = W @ total if layer.side == "output" else total
            M = M - torch.outer(total, total) / max(layer.tokens, 1)
        return self.of_activations(M)

    def F(self, layer: LayerStatistics, W: Tensor) -> Tensor | None:
        """How much each of them matters, undamped; None stands for the identity."""
        if self.by_gradient:
            by_image = layer.sum("image_gradient").to(W) if self.by_image else None
            return self.of_gradients(layer.sum("gradient").to(W), by_image, layer.tokens)
        return None if layer.side == "output" else W.mT @ W

    def of_activations(self, by_token: Tensor, by_image: Tensor | None = None) -> Tensor:
        """A sum of outer products of activations, and that of `P Pᵀ`, as M."""
        return by_token / self.images if by_image is None else balanced(by_image, by_token)

    def of_gradients(self, by_token: Tensor, by_image: Tensor | None, tokens: int) -> Tensor:
        """A sum of outer products of gradients, and that of `Pᵀ P`, as F.

        ½ E[(gᵀδ)²] summed over the tokens of an image, taken as independent: M holds sums per image, F means per token.
        """
        if by_image is None:
            return by_token / (2 * max(tokens, 1) * self.samples)
        return balanced(by_image, by_token) * by_image.trace() / (2 * self.images * self.samples)

    def damped(self, F: Tensor, W: Tensor, side: str) -> Tensor:
        """F with a floor under the output gradients: `S + δ · 1`, which on the input side reads `H + δ WᵀW`."""
        if not self.by_gradient:
            return F
        floor = torch.eye(len(F), dtype=F.dtype, device=F.device) if side == "output" else W.mT @ W
        return F + self.damping * F.trace() / floor.trace().clamp_min(torch.finfo(F.dtype).tiny) * floor


def balanced(by_image: Tensor, by_token: Tensor) -> Tensor:
    """Half a moment of images and half one of tokens, with a trace of 1: there are hundreds of times more tokens.

    A moment of images alone fits the images at hand; 100 of them gave worse ranks than tokens did (docs/measured.md).
    """
    tiny = torch.finfo(by_image.dtype).tiny
    return by_image / (2 * by_image.trace().clamp_min(tiny)) + by_token / (2 * by_token.trace().clamp_min(tiny))
