"""The first rung: A and the bias of low-rank layers, scale and shift of LayerNorms, solved again on changed inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlr.data.batches import to_model
from vitlr.nn import LowRankLinear
from vitlr.refinement.blocks import comparable, finite, free_layers, free_norms, run_until, watched
from vitlr.refinement.images import Proxy
from vitlr.refinement.judge import Judge
from vitlr.refinement.recipe import Recipe
from vitlr.refinement.share import Share
from vitlr.runtime import processes
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.progress import Progress

# Ridges towards the present A, in units of the mean eigenvalue of Σ z zᵀ; without end, only the bias moves.
RIDGE, LESS, BIAS_ONLY = 1.0, 0.1, float("inf")
NORM_RIDGE = 10.0  # towards the present scale, in units of the mean variance of z


@torch.no_grad()
def refit(
    model: nn.Module,
    reference: nn.Module,
    proxy: Proxy,
    judge: Judge,
    recipe: Recipe,
    share: Share,
    progress: Progress,
) -> tuple[int, str]:
    """In place, module after module, each judged by the whole network; (modules tried, a note).

    Low-rank layers: `min_{ΔA, Δb} Σ ‖y − ỹ − ΔA z − Δb‖² + λ ‖ΔA‖²`, z = B x̃. y is the dense network's output of the
    layer, ỹ and x̃ the compressed one's, after all modules before it have been refitted. Least squares on shifted
    inputs shrinks towards the mean, and over many layers that is worse than the shift (λ = 0 lost 20 points on a
    ViT-Ti); so the solution is anchored to the present A, every λ is judged on held-out images, and a layer where none
    helps keeps what it has, as one with a frozen parameter does. LayerNorms: the same channel by channel, with z the
    normalised input, for scale and shift. That is what corrects the mean of what narrowed MLPs hand on.
    """
    layers, norms = comparable(free_layers(model), model, reference), free_norms(model, reference)
    wanted = {*layers, *norms}
    names = [name for name, _ in model.named_modules() if name in wanted]
    nearest = judge(model).kl
    tried = refitted = shifted = rescaled = 0

    def better(parameters: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> bool:
        """Put the values in; keep them if the network is nearer than ever, else put back what was there."""
        nonlocal nearest
        before = [None if p is None else p.clone() for p in parameters]
        _copy(values, parameters)
        kl = judge(model).kl
        if kl < nearest:
            nearest = kl
            return True
        _copy(before, parameters)
        return False

    for name in names:
        if share.over(tried):
            break
        module = model.get_submodule(name)
        if isinstance(module, LowRankLinear):
            sums = LayerSums.empty(module)
            _measure(model, reference, proxy, recipe, name, module.down, sums)
            A, bias = module.up.weight.clone(), None if module.up.bias is None else module.up.bias.clone()
            own = module.up.weight, module.up.bias
            if better(own, sums.solve(A, bias, RIDGE)):
                better(own, sums.solve(A, bias, LESS))
                refitted += 1
            elif bias is not None:
                shifted += better(own, sums.solve(A, bias, BIAS_ONLY))
        else:
            assert isinstance(module, nn.LayerNorm)
            channels = ChannelSums.empty(module)
            _measure(model, reference, proxy, recipe, name, _normalised(module), channels)
            own = module.weight, module.bias
            rescaled += better(own, channels.solve(*own, NORM_RIDGE))
        tried += 1
        progress(tried, share.most(len(names)))
    note = f"{refitted} of {len(layers)} layers refitted, {shifted} more corrected in the bias"
    note += f", {rescaled} of {len(norms)} norms" if norms else ""
    return tried, note + (f"; its share was over after {tried} of {len(names)}" if tried < len(names) else "")


def _copy(values: Sequence[Tensor | None], parameters: Sequence[Tensor | None]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        if parameter is not None and value is not None:
            parameter.copy_(value)


def _normalised(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    return lambda x: F.layer_norm(x, norm.normalized_shape, eps=norm.eps)


def _measure(
    model: nn.Module,
    reference: nn.Module,
    proxy: Proxy,
    recipe: Recipe,
    name: str,
    inner: Callable[[Tensor], Tensor],
    sums: LayerSums | ChannelSums,
) -> None:
    """Add `inner(x̃)` and `y − ỹ` of every batch to the sums: one pass of both networks, up to the module."""
    expected: list[Tensor] = []

    def compare(_: str, x: Tensor, y: Tensor) -> None:
        sums.add(inner(x).double(), expected.pop().double().to(y.device) - y.double())

    with (
        evaluation_mode(model),
        evaluation_mode(reference),
        watched(reference, [name], lambda _, x, y: expected.append(y)),
        watched(model, [name], compare),
    ):
        for images in proxy.own(recipe.proxy_images):
            for part in images.split(recipe.batch_size):
                run_until(reference, to_model(reference, part), name)
                run_until(model, to_model(model, part), name)
    sums.together()
    finite(name, sums.zz, sums.ez)


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

    def together(self) -> None:
        """Those of all processes, in each."""
        tensors = (self.z, self.e, self.zz, self.ez)
        processes.sum_in_order(tensors)
        processes.spread(tensors)
        self.tokens = sum(processes.gather(self.tokens))

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
