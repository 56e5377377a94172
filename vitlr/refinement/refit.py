"""The first rung: A and the bias solved again, layer after layer, on the inputs that the compressed network gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitlr.inputs import to_model
from vitlr.modes import evaluation_mode
from vitlr.nn import LowRankLinear
from vitlr.refinement.blocks import comparable, finite, free_layers, run_until, watched
from vitlr.refinement.images import Proxy
from vitlr.refinement.judge import Judge
from vitlr.refinement.recipe import Recipe

# Ridges towards the present A, in units of the mean eigenvalue of Σ z zᵀ; without end, only the bias moves.
RIDGE, LESS, BIAS_ONLY = 1.0, 0.1, float("inf")


@torch.no_grad()
def refit(
    model: nn.Module,
    reference: nn.Module,
    proxy: Proxy,
    judge: Judge,
    recipe: Recipe,
    progress: Callable[[int, int | None], None],
) -> tuple[int, str]:
    """In place, layer after layer: `min_{ΔA, Δb} Σ ‖y − ỹ − ΔA z − Δb‖² + λ ‖ΔA‖²`, z = B x̃; (layers tried, a note).

    y is the dense network's output of the layer, ỹ and x̃ the compressed one's, after all layers before it have been
    refitted. Least squares on shifted inputs shrinks towards the mean, and over many layers that is worse than the
    shift (λ = 0 lost 20 points on a ViT-Ti); so the solution is anchored to the present A, every λ is judged on
    held-out images with the whole network, and a layer where none helps keeps what it has, as one with a frozen
    parameter does.
    """
    names = comparable(free_layers(model), model, reference)
    nearest = judge(model).kl
    refitted = shifted = 0
    for done, name in enumerate(names, 1):
        layer = model.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        sums = _measure(model, reference, proxy, recipe, name)
        start = best = _values(layer)
        chosen = None
        for ridge in (RIDGE, LESS, BIAS_ONLY):
            if (ridge == LESS and chosen is None) or (ridge == BIAS_ONLY and (chosen or start[1] is None)):
                continue
            _set(layer, *sums.solve(*start, ridge))
            kl = judge(model).kl
            if kl < nearest:
                nearest, best, chosen = kl, _values(layer), ridge
        _set(layer, *best)
        refitted += chosen in (RIDGE, LESS)
        shifted += chosen == BIAS_ONLY
        progress(done, len(names))
    return len(names), f"{refitted} of {len(names)} layers refitted, {shifted} more corrected in the bias"


@dataclass
class _Sums:
    """Sums over tokens of one layer: z = B x̃ `[r]` and the residual e = y − ỹ `[N]`, in float64."""

    tokens: int
    z: Tensor
    e: Tensor
    zz: Tensor
    ez: Tensor

    @classmethod
    def empty(cls, layer: LowRankLinear) -> _Sums:
        A = layer.up.weight.detach().double()
        N, r = A.shape
        return cls(0, A.new_zeros(r), A.new_zeros(N), A.new_zeros(r, r), A.new_zeros(N, r))

    def add(self, z: Tensor, e: Tensor) -> None:
        z, e = z.flatten(0, -2), e.flatten(0, -2)
        self.tokens += len(z)
        self.z += z.sum(0)
        self.e += e.sum(0)
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


def _measure(model: nn.Module, reference: nn.Module, proxy: Proxy, recipe: Recipe, name: str) -> _Sums:
    """One pass of both networks, up to the layer."""
    layer = model.get_submodule(name)
    assert isinstance(layer, LowRankLinear)
    sums = _Sums.empty(layer)
    seen: dict[str, Tensor] = {}

    def keep(key: str) -> Callable[[str, Tensor, Tensor], None]:
        return lambda _, x, y: seen.__setitem__(key, y.double())

    def compare(_: str, x: Tensor, y: Tensor) -> None:
        sums.add(seen["z"], seen["dense"].to(y.device) - y.double())

    with (
        evaluation_mode(model),
        evaluation_mode(reference),
        watched(reference, [name], keep("dense")),
        watched(model, [f"{name}.down"], keep("z")),
        watched(model, [name], compare),
    ):
        for images in proxy.plain(recipe.proxy_images):
            for part in images.split(recipe.batch_size):
                run_until(reference, to_model(reference, part), name)
                run_until(model, to_model(model, part), name)
    finite(name, sums.zz, sums.ez)
    return sums


def _values(layer: LowRankLinear) -> tuple[Tensor, Tensor | None]:
    bias = layer.up.bias
    return layer.up.weight.detach().clone(), None if bias is None else bias.detach().clone()


def _set(layer: LowRankLinear, A: Tensor, bias: Tensor | None) -> None:
    layer.up.weight.copy_(A)
    if bias is not None:
        layer.up.bias.copy_(bias)
