"""A rung of its own: gains of all rows of all linears at once, by one Gauss-Newton step towards the dense answers.

A plan solves what each layer loses by itself; how that adds up over the layers is left. A thousand images are too few
to say it of millions of weights, or of shifts (docs/measured.md), but not of a gain for every row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vitlr.anatomy import linears
from vitlr.data.batches import first_tensor, to_model
from vitlr.measuring.losses import divergence, image_seeds, is_logits, sampled_losses
from vitlr.refinement.blocks import finite
from vitlr.refinement.images import Proxy
from vitlr.refinement.judge import Judge
from vitlr.refinement.recipe import Recipe
from vitlr.refinement.share import Share
from vitlr.runtime import processes
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.progress import Progress

RIDGES = (3.0, 10.0, 1.0)  # each is judged; 3 was best on a ViT-Ti (docs/measured.md)


def rescale(
    model: nn.Module,
    reference: nn.Module,
    proxy: Proxy,
    judge: Judge,
    recipe: Recipe,
    share: Share,
    progress: Progress,
) -> tuple[int, str]:
    """In place, the weight of every free linear to `diag(1 + a) W`, factors included; (steps, a note).

    a holds the gains of all rows of all of them. With `u_i = ∂KL_i/∂a` of an image, and `v_i = ∂⟨w_i, z_i⟩/∂a` with the
    Fisher matrix of its answer z for the mean of w wᵀ, `a = −(mean v vᵀ + λ)⁻¹ mean u`: what its own quadratic says of
    held-out images is what they say. The λ of `RIDGES` is taken that brings the network nearest.
    """
    free = [linear for linear in linears.targets(model, factors=True).values() if linear.weight.requires_grad]
    if not free or share.over(0):
        return 0, "" if free else "no linear is free"
    weights = [linear.weight for linear in free]
    u, v = _measured(model, reference, proxy, judge, weights, recipe.seed, progress)
    finite("the gradients by gains", u, v)
    before, nearest, taken = [W.detach().clone() for W in weights], judge(model).kl, None
    for strength in RIDGES:
        gains = solved(u, v, strength)
        _put(weights, before, gains)
        if (kl := judge(model).kl) < nearest:
            nearest, taken = kl, (strength, gains)
    strength, gains = taken or (float("inf"), torch.zeros_like(u))
    _put(weights, before, gains)
    return 1, f"ridge {strength:g}, gains of {float(gains.square().mean().sqrt()):.2%}"


@torch.no_grad()
def solved(u: Tensor, v: Tensor, strength: float) -> Tensor:
    """`a = −(mean v vᵀ + λ)⁻¹ u` `[D]` of u `[D]`, v `[n, D]`, with `λ = strength / n · tr(mean v vᵀ)`.

    By Woodbury, with `J = v / √n`: `a = −(u − Jᵀ (J Jᵀ + λ)⁻¹ J u) / λ`, so the system is as large as there are images.
    """
    J = v / len(v) ** 0.5
    gram = (J @ J.mT).double()
    ridge = (strength * gram.trace() / len(gram)).clamp_min(torch.finfo(torch.float32).tiny)
    gram.diagonal().add_(ridge)
    inner = torch.linalg.solve(gram, (J @ u).double())
    return (u.double() - J.mT.double() @ inner).neg() / ridge


def slopes(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """`∂L/∂a = Σ_columns W ∘ ∂L/∂W` of the gains of all rows, `[D]`."""
    return torch.cat([(W.detach() * grad).sum(1) for W, grad in zip(weights, grads, strict=True)]).float().cpu()


@torch.no_grad()
def _put(weights: Sequence[Tensor], before: Sequence[Tensor], gains: Tensor) -> None:
    """`diag(1 + a) W` of the weights that were there before."""
    for W, old, a in zip(weights, before, gains.split([len(W) for W in weights]), strict=True):
        W.copy_(old * (1 + a.to(old))[:, None])


def _measured(
    model: nn.Module,
    reference: nn.Module,
    proxy: Proxy,
    judge: Judge,
    weights: Sequence[Tensor],
    seed: int,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """The mean of u `[D]` and all v `[n, D]` of the images to learn from, on the CPU; one image at a time."""
    total, rows = torch.zeros(sum(len(W) for W in weights)), []
    for image in _singly(proxy):
        with evaluation_mode(reference), torch.no_grad():
            expected = first_tensor(judge.pick(reference(to_model(reference, image)))).float().flatten(1)
        with evaluation_mode(model), torch.enable_grad():
            answer = judge.pick(model(to_model(model, image)))
            away = divergence(expected, first_tensor(answer).float().flatten(1), is_logits(model, answer))
            (probe,) = sampled_losses(model, answer, image_seeds([image], seed), 1)
            grads = torch.autograd.grad(away, weights, retain_graph=True, materialize_grads=True)
            total += slopes(weights, grads)
            rows.append(slopes(weights, torch.autograd.grad(probe, weights, materialize_grads=True)))
        progress(len(rows) * processes.world(), proxy.count)
    found = processes.gather((total, torch.stack(rows)))
    v = torch.cat([own for _, own in found])
    return torch.stack([part for part, _ in found]).sum(0) / len(v), v


def _singly(proxy: Proxy) -> Iterator[Tensor]:
    """Its own images, one at a time."""
    for batch in proxy.own(proxy.count):
        yield from batch.split(1)
