"""A linear layer of integers that learn: latent weights, of which every forward pass sees the codes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlr.nn.quantized_linear import LARGEST, QuantizedLinear, weight


class LatentLinear(nn.Module):
    """`y = W x + b`, `W_ij = q_ij · 2^((r_i + c_j) / 8)`, `q = round(u)`: a `QuantizedLinear` while it is trained.

    u `[N, K]` are latent weights in float32, in steps of their own entry. The gradient of q is taken for theirs
    (straight through: Bengio, Léonard and Courville, arXiv 1308.3432), so u gathers what many batches ask for before
    a code changes. It starts at q: nearer to the dense weight, noise would undo what codes make up for in each other.
    Exponents and lower bytes stay; the bias is the layer's own.
    """

    row_exponent: Tensor
    column_exponent: Tensor
    fine: Tensor | None
    twice: Tensor | None

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("row_exponent", layer.row_exponent)
        self.register_buffer("column_exponent", layer.column_exponent)
        self.register_buffer("fine", layer.fine)
        self.register_buffer("twice", layer.twice)
        self.latent = nn.Parameter(layer.codes.float())
        self.bias = layer.bias
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        W = weight(self, _Round.apply(self.latent))  # as the layer of integers forms it, to the bit
        return F.linear(x.to(dtype), W.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def codes(self) -> Tensor:
        """q `[N, K]`, int8."""
        return nearest(self.latent.detach())

    def quantized(self) -> QuantizedLinear:
        """The layer of integers that this one is, with the bias that it has."""
        layer = QuantizedLinear.from_codes(self.codes(), self.row_exponent, self.column_exponent, None)
        layer.bias, layer.fine, layer.twice = self.bias, self.fine, self.twice
        return layer.train(self.training)


class _Round(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return u.round().clamp(-LARGEST, LARGEST)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def nearest(u: Tensor, towards_zero: float = 0.0) -> Tensor:
    """The int8 codes of latent weights, after all have come nearer to 0 by a share of a step."""
    nearer = u if towards_zero == 0 else u.sign() * (u.abs() - towards_zero).clamp_min(0)
    return nearer.round().clamp(-LARGEST, LARGEST).to(torch.int8)
