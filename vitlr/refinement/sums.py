"""Least squares anchored to what is there, from sums over tokens: for low-rank layers, and channel by channel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitlr.nn import LowRankLinear


@dataclass
class Sums(ABC):
    """Sums over tokens of what goes in, z, of the residual e = y − ỹ, and of their products, in float64."""

    tokens: int
    z: Tensor
    e: Tensor
    zz: Tensor
    ez: Tensor

    def add(self, z: Tensor, e: Tensor) -> None:
        """Add the tokens of a batch."""
        z, e = z.flatten(0, -2), e.flatten(0, -2)
        self.tokens += len(z)
        self.z += z.sum(0)
        self.e += e.sum(0)
        self._multiply(z, e)

    @abstractmethod
    def _multiply(self, z: Tensor, e: Tensor) -> None:
        """Add to `zz` and `ez`."""


class LayerSums(Sums):
    """Those of one low-rank layer: z = B x̃ `[r]`, e `[N]`, products `[r, r]` and `[N, r]`."""

    @classmethod
    def empty(cls, layer: LowRankLinear) -> LayerSums:
        A = layer.up.weight.detach().double()
        N, r = A.shape
        return cls(0, A.new_zeros(r), A.new_zeros(N), A.new_zeros(r, r), A.new_zeros(N, r))

    def _multiply(self, z: Tensor, e: Tensor) -> None:
        self.zz += z.mT @ z
        self.ez += e.mT @ z

    def solve(self, A: Tensor, bias: Tensor | None, strength: float) -> tuple[Tensor, Tensor | None]:
        """The new A and bias; a layer without bias is solved without centring and keeps none."""
        zz, ez = self.zz, self.ez
        if bias is not None:
            zz = zz - torch.outer(self.z, self.z) / self.tokens
            ez = ez - torch.outer(self.e, self.z) / self.tokens
        delta = torch.zeros_like(ez)
        if strength != float("inf"):
            ridge = strength * zz.trace() / len(zz)
            one = torch.eye(len(zz), dtype=zz.dtype, device=zz.device)
            delta = torch.linalg.solve(zz + ridge.clamp_min(1e-30) * one, ez, left=False)
        if bias is not None:
            bias = bias + ((self.e - delta @ self.z) / self.tokens).to(bias)
        return A + delta.to(A), bias


class ChannelSums(Sums):
    """Those of one norm, channel by channel: its normalised input z, all `[C]`."""

    @classmethod
    def empty(cls, norm: nn.LayerNorm) -> ChannelSums:
        zero = torch.zeros_like(norm.weight, dtype=torch.float64)
        return cls(0, *(zero.clone() for _ in range(4)))

    def _multiply(self, z: Tensor, e: Tensor) -> None:
        self.zz += z.square().sum(0)
        self.ez += (z * e).sum(0)

    def solve(self, scale: Tensor, shift: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """The scale and shift of least squared error, the scale held by a ridge of `strength` mean variances."""
        variance = self.zz - self.z.square() / self.tokens
        ridge = (strength * variance.mean()).clamp_min(1e-30)
        delta = (self.ez - self.e * self.z / self.tokens) / (variance + ridge)
        return scale + delta.to(scale), shift + ((self.e - delta * self.z) / self.tokens).to(shift)
