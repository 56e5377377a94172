"""A linear layer that multiplies 8-bit floats: `y = s (scale ⊙ (W q)) + b`, `q = e4m3(x / s)`, s a scale a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitlr.nn._weightless import Fixed
from vitlr.ops.layers import fp8_chain as op


class Fp8Linear(Fixed):
    """`y = s (scale ⊙ (W q)) + b` with `q = e4m3(x / s)`: x [..., K] -> y [..., N] in x's dtype.

    `codes` [N, K] in float8_e4m3fn, `scale`, `bias` [N], `reach` [2] in fp32, which `.to(dtype)` and autocast leave
    alone. Scales of rows come from the rows themselves: no image is asked for. For running only: there is no gradient.
    """

    CHAIN: ClassVar[Callable[..., Tensor]] = staticmethod(op.fp8_chain)

    scale: Tensor
    bias: Tensor | None
    reach: Tensor
    codes: Tensor

    def __init__(self, step: op.Step) -> None:
        super().__init__()
        self.out_features, self.in_features = step.codes.shape
        for name in ("scale", "bias", "reach", "codes"):  # the first float is what parents take for its dtype
            self.register_buffer(name, getattr(step, name))

    @property
    def step(self) -> op.Step:
        """What the op takes."""
        return op.Step(*map(self._buffers.get, op.Step._fields))  # type: ignore[arg-type] # past a slow __getattr__

    def forward(self, x: Tensor) -> Tensor:
        return op.fp8_chain(x, [self.step], ["none"])

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> Fp8Linear:
        """The layer nearest to a dense one: every row of its weight rounded to e4m3 by a scale of its own."""
        return cls(op.step_of(linear.weight, linear.bias)).train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The dense layer in fp32 of the same function but for the rounding of x, on the same device."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.codes.float() * self.scale[:, None])
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear.train(self.training)

    @torch.no_grad()
    def multiply(self, gamma: Tensor) -> None:
        """Return `gamma ⊙ y` [N] from now on: scales and bias take its size, codes its sign."""
        gamma = gamma.detach().to(self.scale)
        self.codes.copy_((self.codes.float() * gamma.sign()[:, None]).to(op.FP8))
        self.scale.mul_(torch.where(gamma == 0, 1.0, gamma.abs()))
        if self.bias is not None:
            self.bias.mul_(gamma)
        self.reach.copy_(op.reach_of(self.codes, self.scale, self.bias))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
