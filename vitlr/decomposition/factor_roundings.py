"""Rounding the two factors of `W_r = A B`: what a level costs both together, and the layer of integers.

`A diag(t), diag(1/t) B` is the same layer for every t > 0; t is such that every entry of `z = B x` has a variance of 1.
Then A sees inputs of one size, B is seen through `Aᵀ S A`, and the losses of both roundings and of the rank add up. One
level serves both, as it serves every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitlr.decomposition.roundings import SAMPLE, Rounding
from vitlr.decomposition.sides import Sides
from vitlr.nn import LowRankLinear

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class FactorRounding:
    """Both factors of a layer at all levels: `up` is A `[N, r]`, `down` is B `[r, K]`, in the gauge of rounding."""

    sides: Sides
    up: Rounding
    down: Rounding

    @classmethod
    def of(cls, name: str, sides: Sides, A: Tensor, B: Tensor, whole: Rounding | None = None) -> FactorRounding:
        """Of a layer with these sides, which those of `whole` may be. Raises `NumericalError` for no moments."""
        A, B = A.detach().cpu().double(), B.detach().cpu().double()
        C = sides.moments()[1]
        t = ((B @ C) * B).sum(1).clamp_min(_TINY).sqrt()
        A, B = A * t, B / t[:, None]
        outputs, inputs = (None, None) if whole is None else (whole.outputs, whole.inputs)
        up = Rounding.of(name, sides.through(B=B), A, outputs=outputs)
        return cls(sides, up, Rounding.of(name, sides.through(A=A), B, inputs=inputs))

    def costs(self, level: int, sample: int = SAMPLE) -> tuple[float, float]:
        """Bytes of the file and predicted nats of both at a level, without those of the rank."""
        (size_A, loss_A), (size_B, loss_B) = self.up.costs(level, sample), self.down.costs(level, sample)
        return size_A + size_B, loss_A + loss_B

    def rounded(self, level: int, bias: Tensor | None) -> LowRankLinear:
        """The layer of integers: A is rounded, B solved again for it, `(Âᵀ S Â)⁻¹ Âᵀ S A B`, and then rounded."""
        A, B = self.up.weight, self.down.weight
        up = self.up.rounded(level, A, None)
        rounded, S = up.dense_weight(torch.float64), self.sides.moments()[0]
        seen = rounded.mT @ S
        again = torch.linalg.lstsq(seen @ rounded, seen @ A @ B).solution
        seen_again = Rounding.of(self.up.name, self.sides.through(A=rounded), again, inputs=self.down.inputs)
        down = seen_again.rounded(level, again, None)
        if bias is not None:
            error = A @ B - rounded @ down.dense_weight(torch.float64)
            up.bias = nn.Parameter((bias.detach().double().cpu() + error @ self.sides.mean()).to(bias.dtype))
        return LowRankLinear.from_layers(down, up)
