"""The second rung: the learnt residual of arXiv 2402.06004, a compact low-rank pair on top of the principal one.

A layer `A B` of rank r becomes its principal part of rank r₁ (the best one for the layer's own outputs) and a pair
`A₂ B₂` of rank r₂ = r − r₁ that is learnt by gradient on the layer's normalised output error over the proxy images,
from a zero left and a random right factor. Merging is exact, `[A₁ A₂][B₁; B₂]`, so the budget stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitlr.data.batches import to_model
from vitlr.nn import LowRankLinear
from vitlr.ops.linalg.factors import balance
from vitlr.refinement.blocks import by_block, comparable, finite, free_layers, lowrank_layers, run_until, watched
from vitlr.refinement.images import Proxy
from vitlr.refinement.judge import Judge
from vitlr.refinement.recipe import Recipe
from vitlr.refinement.share import Share
from vitlr.runtime import processes
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.modules import device_of
from vitlr.runtime.progress import Progress

_HELD_PART = 4  # every fourth image judges
_TOKENS = 1024  # in a step
_LR = 3e-3  # of Adam, in units where inputs have size 1


def regrow(
    model: nn.Module,
    reference: nn.Module,
    proxy: Proxy,
    judge: Judge,
    recipe: Recipe,
    share: Share,
    progress: Progress,
) -> tuple[int, str]:
    """In place, block after block; (steps, a note).

    The target is the dense network's output of the layer; the input is that of the compressed network (sequential:
    later layers see what earlier ones did) or of the dense one (`parallel`). A layer keeps its residual only if its
    error falls on tokens it did not learn from, and a block only if the whole network comes nearer on held-out images.
    Layers with a frozen parameter stay as they are.
    """
    free = set(comparable(free_layers(model), model, reference, inputs=recipe.parallel))
    layers = [name for name in lowrank_layers(model) if name in free]
    ranks = {name: _share_of(model, name, recipe.regrow_share) for name in layers}
    blocks = by_block([name for name in layers if ranks[name]])
    nearest = judge(model).kl
    whole, tried, learnt = sum(map(len, blocks.values())), 0, 0
    for block, names in blocks.items():
        if share.over(tried):
            break
        names = names[: share.most(whole) - tried]
        tokens = _collect(model, reference, proxy, recipe, block, names)
        before = {name: copy for name in names if (copy := _factors(model, name))}
        kept = 0

        def learnt_of(own: Sequence[str], tokens: dict[str, _Tokens] = tokens) -> Iterator[tuple[bool, Tensor, Tensor]]:
            for name in own:
                layer = model.get_submodule(name)
                assert isinstance(layer, LowRankLinear)
                generator = torch.Generator().manual_seed(recipe.seed)
                takes = learn(layer, tokens[name], ranks[name], recipe.regrow_steps, generator)
                A, B = _factors(model, name)
                yield takes, A.cpu(), B.cpu()

        for name, (takes, A, B) in zip(names, processes.shared_out(learnt_of, names), strict=True):
            _set(model, name, A, B)
            kept += takes
        kl = judge(model).kl if kept else math.inf
        if kl < nearest:
            nearest, learnt = kl, learnt + kept
        else:
            for name, factors in before.items():
                _set(model, name, *factors)
        tried += len(names)
        progress(tried, share.most(whole))
    note = f"{learnt} of {len(layers)} layers took a residual"
    note += f"; its share was over after {tried} of {whole}" if tried < whole else ""
    return tried * recipe.regrow_steps, note


def _share_of(model: nn.Module, name: str, share: float) -> int:
    """The ranks that a layer's residual learns, 0 where that would be none or all."""
    layer = model.get_submodule(name)
    assert isinstance(layer, LowRankLinear)
    rank = round(share * layer.rank)
    return rank if rank < layer.rank else 0


@dataclass
class _Tokens:
    """Inputs x `[T, K]` and wanted outputs y `[T, N]` of one layer, image by image."""

    x: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)

    def split(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Tokens to learn from, and those of every fourth image to judge by."""
        held = [i % _HELD_PART == _HELD_PART - 1 for i in range(len(self.x))]
        parts = []
        for wanted in (False, True):
            chosen = [i for i, is_held in enumerate(held) if is_held is wanted]
            parts.append((torch.cat([self.x[i] for i in chosen]), torch.cat([self.y[i] for i in chosen])))
        return parts[0], parts[1]


def learn(layer: LowRankLinear, tokens: _Tokens, share: int, steps: int, generator: torch.Generator) -> bool:
    """Give `share` ranks of the layer to a learnt residual, if its error falls on tokens held out; whether it did."""
    (x, y), held = tokens.split()
    A, B = layer.up.weight.detach(), layer.down.weight.detach()
    bias = torch.zeros(len(A)).to(A) if layer.up.bias is None else layer.up.bias.detach()
    A1, B1 = principal(A, B, x, layer.rank - share)
    wanted = y - bias - x @ B1.mT @ A1.mT  # what the residual has to give
    scale = wanted.square().mean().sqrt().clamp_min(1e-30)
    size = x.square().mean().sqrt().clamp_min(1e-30)
    x, wanted = x / size, wanted / scale
    A2 = torch.zeros(len(A), share).to(A).requires_grad_()
    B2 = (torch.randn(share, x.shape[1], generator=generator) / x.shape[1] ** 0.5).to(A).requires_grad_()
    optimizer = torch.optim.Adam([A2, B2], lr=_LR)
    with torch.enable_grad():
        for step in range(steps):
            rows = torch.randint(len(x), (min(_TOKENS, len(x)),), generator=generator).to(x.device)
            target = wanted[rows]
            loss = (x[rows] @ B2.mT @ A2.mT - target).square().sum() / target.square().sum().clamp_min(1e-30)
            optimizer.param_groups[0]["lr"] = _LR * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    A2, B2 = A2.detach() * (scale / size), B2.detach()
    merged = balance(torch.cat([A1, A2], 1).double(), torch.cat([B1, B2]).double())
    new = tuple(factor.to(A) for factor in merged)
    if not _error(new[0], new[1], bias, *held) < _error(A, B, bias, *held):
        return False
    with torch.no_grad():
        layer.up.weight.copy_(new[0])
        layer.down.weight.copy_(new[1])
    return True


def principal(A: Tensor, B: Tensor, x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`U Uᵀ A B`, U the first left singular vectors of `A B Xᵀ`: the best of that rank for the layer's own outputs."""
    z = x.double() @ B.double().mT
    outputs = A.double() @ (z.mT @ z) @ A.double().mT
    U = torch.linalg.eigh(outputs)[1].flip(-1)[:, :rank]
    return U.to(A), (U.mT @ A.double() @ B.double()).to(B)


@torch.no_grad()
def _error(A: Tensor, B: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> float:
    """`‖y − A B x − b‖² / ‖y‖²` over all tokens."""
    return float((y - bias - x @ B.mT @ A.mT).double().square().sum() / y.double().square().sum().clamp_min(1e-30))


@torch.no_grad()
def _collect(
    model: nn.Module, reference: nn.Module, proxy: Proxy, recipe: Recipe, block: str, names: list[str]
) -> dict[str, _Tokens]:
    """Tokens of every layer of a block: outputs of the dense network, inputs of the one that the recipe names."""
    found = {name: _Tokens() for name in names}
    device = device_of(model)

    def split(tensor: Tensor, images: int) -> list[Tensor]:
        return [
            part.flatten(0, -2)
            for part in tensor.detach().to(device).float().reshape(images, -1, tensor.shape[-1]).split(1)
        ]

    with evaluation_mode(model), evaluation_mode(reference):
        for batch in proxy.plain(recipe.proxy_images):
            for part in batch.split(recipe.batch_size):
                count = len(part)

                def outputs(name: str, x: Tensor, y: Tensor, count: int = count) -> None:
                    found[name].y += split(y, count)
                    if recipe.parallel:
                        found[name].x += split(x, count)

                def compressed(name: str, x: Tensor, y: Tensor, count: int = count) -> None:
                    if not recipe.parallel:
                        found[name].x += split(x, count)

                with watched(reference, names, outputs):
                    run_until(reference, to_model(reference, part), block)
                with watched(model, names, compressed):
                    run_until(model, to_model(model, part), block)
    for name, tokens in found.items():
        finite(name, *tokens.x, *tokens.y)
    return found


def _factors(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    layer = model.get_submodule(name)
    assert isinstance(layer, LowRankLinear)
    return layer.up.weight.detach().clone(), layer.down.weight.detach().clone()


@torch.no_grad()
def _set(model: nn.Module, name: str, A: Tensor, B: Tensor) -> None:
    layer = model.get_submodule(name)
    assert isinstance(layer, LowRankLinear)
    layer.up.weight.copy_(A)
    layer.down.weight.copy_(B)
