"""What the matrices beside the linears may be rounded to: bytes and nats of every number of bits a row."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.objectives import Objective
from vitlr.runtime import compact

Bits = dict[int, tuple[float, float]]  # bytes of the file and nats by number of bits, the most first
_PIXELS = 6  # bits of a convolution at least: at 5, one cost seven times what is predicted (docs/method.md)


def matrix_bits(model: nn.Module, stats: Statistics, objective: Objective) -> Mapping[str, Bits]:
    """Of all that calibration saw the gradients of; none where the objective is not of gradients."""
    if not objective.by_gradient:
        return {}
    images = 2 * max(stats.images, 1) * stats.samples
    known = dict(model.named_parameters())
    return {name: _bits(known[name].detach(), lost / images) for name, lost in stats.others.items() if name in known}


def _bits(value: Tensor, lost: Tensor) -> Bits:
    least = _PIXELS if value.ndim > 3 else 0
    pairs = [(bits, nats) for bits, nats in zip(compact.BITS, lost.tolist(), strict=True) if bits >= least]
    return {bits: (_bytes(value, bits), nats) for bits, nats in pairs}


def _bytes(value: Tensor, bits: int) -> float:
    return float(sum(part.nbytes for part in compact.stored(compact.rounded(value, bits)).values()))
