"""The steps in which a linear's inputs become bytes: those that lose least, and what they lose.

Every channel of an input has a step of its own, 1/255 of its range: what a fold into the norm before, or into the
layer before, would do for some layers is done for all of them where the input becomes bytes. A wider step costs the
input more and the weight less, since the weight's columns are multiplied by it before their rows are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlr.calibration.statistics import LayerStatistics
from vitlr.nn import Int8Linear
from vitlr.ops.layers.int8_chain import LARGEST

_TINY = 1e-30  # where all is zero


@torch.no_grad()
def int8_linear(linear: nn.Linear, stats: LayerStatistics) -> tuple[Int8Linear, float]:
    """The layer of bytes for inputs as they were measured, in the steps that cost least, and what they cost a token."""
    device = linear.weight.device
    low, high = (stats.sum(key).to(device) for key in ("input_low", "input_high"))
    mean = stats.sum("input_sum").to(device) / max(stats.tokens, 1)
    W, width = linear.weight.double(), high - low
    least = width.clamp_min(1e-6 * width.mean()).clamp_min(_TINY) / LARGEST  # a channel may never have changed
    s, cost = steps(W, least, *_costs(W, mean, stats))
    middle, half = (low + high) / 2, s * LARGEST / 2
    return Int8Linear.from_weight(W, linear.bias, middle - half, middle + half, mean), cost


def steps(W: Tensor, least: Tensor, V: Tensor, H: Tensor, S: Tensor) -> tuple[Tensor, float]:
    """The steps s [K] of inputs, none below `least`, that lose least: `Σ_j H_j s_j² / 12 + Σ_ij S_i V_j E_ij²`.

    V [K]: variances of the inputs; H [K]: what a unit of noise on an input costs, diag(Wᵀ S W); S [N]: on an output.
    E is the error of W [N, K] where the rows of `W ⊙ s` are rounded to eight bits. Both terms are even at
    `s_j ∝ (V_j / H_j)^¼`; how wide that is is tried out, from all as they are to all alike in this sense.
    """
    ratio = (V / H).pow(0.25)
    best, lost = least, torch.inf
    for share in torch.linspace(0, 1, 11).tolist():
        s = torch.maximum(least, torch.quantile(least / ratio, share) * ratio)
        scale = (W * s).abs().amax(1, keepdim=True) / 127
        E = (W * s / scale.clamp_min(_TINY)).round() * scale / s - W
        loss = float((H * s.square()).sum() / 12 + S @ E.square() @ V)
        if loss < lost:
            best, lost = s, loss
    return best, lost


def _costs(W: Tensor, mean: Tensor, stats: LayerStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """V, H and S of a layer; without gradients every output counts alike."""
    tokens, inputs = max(stats.tokens, 1), stats.side == "input"
    V = (stats.sum("moment").diagonal() if inputs else stats.sum("input_square")).to(W) / tokens - mean.square()
    if stats.gradient is None:
        S = W.new_ones(len(W))
        H = S @ W.square()
    elif inputs:
        S, H = stats.sum("output_square").to(W) / tokens, stats.gradient.diagonal().to(W) / tokens
    else:
        G = stats.gradient.to(W) / tokens
        S, H = G.diagonal(), (W * (G @ W)).sum(0)
    V, H = (t.clamp_min(1e-6 * t.mean()).clamp_min(_TINY) for t in (V, H))
    return V, H, S
