"""The two moments behind every objective: how large the directions of a layer are, how much each of them matters."""

from __future__ import annotations

import torch
from torch import Tensor

from vitlr.calibration.options import GRADIENT_OBJECTIVES
from vitlr.calibration.statistics import LayerStatistics, Statistics


def pair(
    layer: LayerStatistics, W: Tensor, stats: Statistics, objective: str, centred: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The moments M and F of one layer (F None stands for the identity), scaled to the objective's unit."""
    if objective == "fisher":
        M, F = (
            balanced(layer.sum(by_image).to(W), layer.sum(by_token).to(W))
            for by_image, by_token in (("image_moment", "moment"), ("image_gradient", "gradient"))
        )
        return M, F * layer.sum("image_gradient").to(W).trace() / (2 * max(stats.images, 1) * stats.samples)
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


def balanced(by_image: Tensor, by_token: Tensor) -> Tensor:
    """Half a moment of images and half one of tokens, with a trace of 1: there are hundreds of times more tokens.

    A moment of images alone fits the images at hand; 100 of them gave worse ranks than tokens did (docs/measured.md).
    """
    tiny = torch.finfo(by_image.dtype).tiny
    return by_image / (2 * by_image.trace().clamp_min(tiny)) + by_token / (2 * by_token.trace().clamp_min(tiny))


def damped(F: Tensor, W: Tensor, side: str, damping: float, objective: str) -> Tensor:
    """F with a floor under the output gradients: `S + δ · 1`, which on the input side reads `H + δ WᵀW`."""
    if objective not in GRADIENT_OBJECTIVES:
        return F
    floor = torch.eye(len(F), dtype=F.dtype, device=F.device) if side == "output" else W.mT @ W
    return F + damping * F.trace() / floor.trace().clamp_min(torch.finfo(F.dtype).tiny) * floor
