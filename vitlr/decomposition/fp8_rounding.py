"""Weights to 8-bit floats so that the loss of all layers moves least: feedback through both sides, and rows' scales.

An e4m3 is a whole number, 16 at most, times a power of two. So the rounding in turn that integers get
(`vitlr.ops.linalg.rounding`) gives 8-bit floats where an entry's step is an eighth of the octave that the weight lies
in. What is far below its row's spread gets a wider step, room for what later errors ask of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlr.calibration.statistics import LayerStatistics
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.sides import Sides
from vitlr.ops.layers import fp8_chain
from vitlr.ops.linalg.rounding import round_to_steps

_SCALES = 8  # tried for each row, within an octave
_ROOM = 1 / 8  # of a row's spread: smaller weights have the step of such a one
_WHOLE = 16  # of an octave's eighths: where the next octave begins
_END, _LEAST = 448.0, -6  # of e4m3: the largest number, the least exponent
_CALM = 10.0  # medians that an input counts at most: a huge neuron of rare images is no loss as large as its square


@torch.no_grad()
def rounded(linear: nn.Linear, layer: LayerStatistics, objective: Objective) -> fp8_chain.Step:
    """The step of 8-bit floats that loses least of a linear; its bias takes on what the error makes of the mean.

    `layer` holds both sides in full, as the extra "rounding" measures them. Raises `NumericalError` naming the layer
    for moments that are none.
    """
    sides = Sides(layer, objective, linear.bias is not None, most=_CALM)
    rows, columns = sides.factored()
    W = linear.weight.detach().cpu().double()
    scale = _scales(W, columns.D[columns.order.argsort()])
    step = steps(W, scale)
    numbers, _ = round_to_steps(W, step, rows, columns, (_END * scale[:, None] / step).clamp(max=_WHOLE))
    codes = (numbers * step / scale[:, None]).float().to(fp8_chain.FP8)
    bias: Tensor | None = linear.bias
    if bias is not None:
        bias = (bias.detach().cpu().double() + (W - codes.double() * scale[:, None]) @ sides.mean()).float()
    scale = scale.float()
    found = fp8_chain.Step(codes, scale, bias, fp8_chain.reach_of(codes, scale, bias))
    return fp8_chain.Step(*(None if part is None else part.to(linear.weight.device) for part in found))  # type: ignore[arg-type]


def steps(W: Tensor, scale: Tensor) -> Tensor:
    """What whole numbers up to 16 are multiplied by to be e4m3 times the scale of their row [N]: [N, K]."""
    spread = W.square().mean(1, keepdim=True).sqrt()
    size = torch.maximum(W.abs(), _ROOM * spread) / scale[:, None]
    exponent = size.clamp_min(2.0**_LEAST).log2().floor()
    return torch.exp2(exponent - 3) * scale[:, None]


def _scales(W: Tensor, D: Tensor) -> Tensor:
    """Of eight in an octave the scale of each row [N] whose plain rounding loses least, columns weighted by D [K]."""
    most = W.abs().amax(1).clamp_min(1e-30)
    least = fp8_chain.scale_of(most).double()
    best, cost = least, torch.full_like(least, torch.inf)
    for eighth in range(_SCALES):
        scale = least * 2.0 ** (-eighth / _SCALES)
        scale = torch.where(most > _END * scale, 2 * scale, scale)
        lost = ((W / scale[:, None]).float().to(fp8_chain.FP8).double() * scale[:, None] - W).square() @ D
        best, cost = torch.where(lost < cost, scale, best), torch.minimum(lost, cost)
    return best.float().double()  # as it is stored
