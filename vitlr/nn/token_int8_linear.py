"""A linear layer that multiplies bytes by the range of every token: `y = d scale ⊙ (W q) + l scale ⊙ (W 1) + b`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.nn.int8_linear import Int8Linear
from vitlr.nn.quantized_linear import LARGEST, QuantizedLinear
from vitlr.ops.layers.int8_token import int8_token
from vitlr.runtime.compact import power


class TokenInt8Linear(Int8Linear):
    """An `Int8Linear` whose 255 steps go, token by token, from the least to the largest of `multiplier ⊙ x + shift`.

    x [..., K] -> y [..., N]; buffers as there, without `wide`. No image can leave the range, and codes of a
    `QuantizedLinear` serve as they are. What it costs: every token is read twice more, and written in fp32 between.
    """

    def forward(self, x: Tensor) -> Tensor:
        return int8_token(x, self.step)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear | QuantizedLinear) -> TokenInt8Linear:
        """The layer nearest to a dense one, with columns all alike; that of a `QuantizedLinear` has its very codes.

        `W_ij = q_ij 2^(r_i/8) 2^(c_j/8)` are a scale of a row and a multiplier of a column. With columns of two bytes
        there are no such codes, and all are rounded once more.
        """
        if isinstance(linear, QuantizedLinear) and linear.twice is None:
            codes, scale = linear.codes.clone(), power(linear.row_exponent)
            multiplier = power(linear.column_exponent)
        else:
            W = (linear.to_linear() if isinstance(linear, QuantizedLinear) else linear).weight.detach().double()
            scale = (W.abs().amax(1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny).float()
            codes = (W / scale[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
            multiplier = torch.ones_like(W[0]).float()
        layer = cls(linear.in_features, linear.out_features, "meta")
        layer.codes, layer.scale, layer.multiplier = codes, scale.float(), multiplier.float()
        layer.shift = torch.zeros_like(layer.multiplier)
        layer.bias = torch.zeros_like(layer.scale) if linear.bias is None else linear.bias.detach().float().clone()
        return layer.train(linear.training)

    def check(self, name: str) -> None:
        """Raise `InputError` for codes, steps and shapes that no such layer has."""
        if self.wide is not None:
            raise InputError(f"{name}: it goes by the range of every token, and has further columns all the same")
        super().check(name)
