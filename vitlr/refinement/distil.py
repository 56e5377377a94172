"""The third rung: all factors, biases and norms trained together against the dense model, without labels."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.data.batches import to_model
from vitlr.measuring.cost import is_rounded
from vitlr.measuring.losses import divergence, first_tensor
from vitlr.nn import LowRankLinear
from vitlr.refinement.blocks import by_block, lowrank_layers, watched
from vitlr.refinement.images import Proxy
from vitlr.refinement.judge import Judge
from vitlr.refinement.recipe import Recipe
from vitlr.refinement.report import Snapshots
from vitlr.refinement.rounded import Loosened
from vitlr.runtime import processes
from vitlr.runtime.contexts import autocast, evaluation_mode, plain_attention
from vitlr.runtime.kinds import ANY_NUMBER, NONE, tuple_of, whole
from vitlr.runtime.modules import device_of
from vitlr.runtime.progress import Progress
from vitlr.runtime.snapshots import restore
from vitlr.training.state import State

_TIMED = 6  # steps after which `minutes` becomes a number of steps
_NO_END = 2**62
_RATE_TIMES_WIDTH, _RATE_ROUNDED = 0.01, 5e-5  # where nobody says
_CODES, _VECTORS = 100, 20  # rates of rounded models: latent weights, in steps of theirs, and all else, over `lr`


def distil(
    model: nn.Module,
    reference: nn.Module,
    proxy: Proxy,
    judge: Judge,
    recipe: Recipe,
    snapshots: Snapshots,
    progress: Progress,
) -> tuple[int, str]:
    """Train in place on `KL(dense ‖ model) + features · Σ_blocks ‖h − h̃‖² / ‖h − mean h‖² / blocks`; (steps, a note).

    Both see the same augmented images in eval mode. What is left is the running mean of the weights at its best on
    the held-out images, the start included. Frozen parameters stay frozen. A loss that is no number ends the run.
    Rounded layers train latent weights, of which both the loss and the held-out images see the codes. The default rate
    is 0.01 / width: AdamW's steps are alike in every entry, and a row adds up as many as it is wide (arXiv 2203.03466).
    """
    if recipe.lr is None:
        recipe = replace(recipe, lr=_RATE_ROUNDED if is_rounded(model) else _RATE_TIMES_WIDTH / width_of(reference))
    if is_rounded(model):
        loosened = Loosened(model)
        try:
            state: Distilling = Rounding(model, judge, recipe, snapshots, loosened)
            return _train(state, reference, proxy, list(loosened.layers), progress)
        finally:
            loosened.fasten()
    for module in model.modules():
        if isinstance(module, LowRankLinear) and all(p.requires_grad for p in module.parameters()):
            module.balance()
    state = Distilling(model, judge, recipe, snapshots)
    return _train(state, reference, proxy, lowrank_layers(model), progress)


def _train(
    state: Distilling, reference: nn.Module, proxy: Proxy, layers: list[str], progress: Progress
) -> tuple[int, str]:
    """Leave the model at the best of the run; blocks are compared where they hold some of the layers."""
    model, recipe, judge = state.model, state.recipe, state.distance
    names = list(by_block(layers)) if recipe.features else []
    blocks: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    device = device_of(model)

    def loss_of(images: Tensor) -> Tensor:
        own, weight = processes.part(images)
        images = images[own]
        with autocast(device, recipe.amp):
            with torch.no_grad():
                expected = first_tensor(judge.pick(reference(to_model(reference, images))))
            answers = first_tensor(judge.pick(model(to_model(model, images))))
        expected = expected.to(answers.device).float()
        loss = weight * divergence(expected, answers.float(), judge.logits, recipe.temperature)
        for name in names:
            loss = loss + recipe.features / len(names) * _relative(blocks[0][name], blocks[1][name], weight)
        return loss

    with (
        torch.enable_grad(),
        evaluation_mode(model),
        evaluation_mode(reference),
        plain_attention(model, reference),
        watched(reference, names, lambda name, x, y: blocks[0].__setitem__(name, y)),
        watched(model, names, lambda name, x, y: blocks[1].__setitem__(name, y)),
    ):
        start = state.updates
        batches = proxy.mixed(recipe.batch_size, recipe.seed, start, recipe.crop, recipe.color_jitter, recipe.mixup)
        while not state.over:
            images = next(batches)
            if len(images) and state.add(loss_of(images)):
                state.update()
            else:
                state.updates += 1
            state.look()
            progress(state.updates, state.total)
    restore(model, state.best)
    return state.updates, state.note


class Distilling(State):
    """The state of the rung: AdamW, a rate that warms up and falls, looks at the held-out images, early stopping."""

    name, unit = "distil", "step"
    values = (*State.values, "total", "since_best", "curve")
    kinds: Mapping[str, Any] = {
        **State.kinds,
        "total": whole(0) | NONE,
        "since_best": whole(0),
        "curve": [tuple_of(ANY_NUMBER, 2, 2)],
    }

    def __init__(self, model: nn.Module, judge: Judge, recipe: Recipe, snapshots: Snapshots) -> None:
        super().__init__(model, self.optimizer_of(model, recipe), snapshots, mean=True)
        self.distance, self.recipe = judge, recipe
        self.total, self.since_best = recipe.most_steps, 0
        self.curve: list[list[float]] = []
        self.start = time.monotonic()
        if not self.resume():
            self.best_validation = -judge(model).kl
            self.curve.append([0, -self.best_validation])
        self.look_seconds = time.monotonic() - self.start

    def optimizer_of(self, model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW([{"params": trained, "peak": recipe.lr}], weight_decay=recipe.weight_decay)

    def schedule(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate(self.updates, self.total, self.recipe.warmup)

    def clip(self, parameters: list[nn.Parameter]) -> None:
        nn.utils.clip_grad_norm_(parameters, self.recipe.clip)

    def decay(self) -> float:
        """The mean of the first steps would otherwise remember the start for too long."""
        return min(self.recipe.ema, (self.updates + 1) / (self.updates + 10))

    def look(self) -> None:
        """Every now and then: judge the running mean, keep it if it is the best, save a snapshot."""
        if self.updates == 1:
            self.start = time.monotonic()  # the first step starts workers and fills caches
        if self.updates == _TIMED and self.recipe.minutes is not None:
            self.total = min(processes.agreed(self._affordable), self.total or self.recipe.most_steps or _NO_END)
        if self.note or not (self.over or self.updates % self.recipe.every == 0) or not self.read():
            return
        with self.judged() as model:
            kl = self.distance(model).kl
        self.curve.append([self.updates, kl])
        self.since_best = 0 if self.judge(-kl) else self.since_best + 1
        if self.since_best >= self.recipe.patience:
            self.note = f"no gain on held-out images for {self.since_best} looks: stopped early"
        self.save()

    def _affordable(self) -> int:
        assert self.recipe.minutes is not None
        each = (time.monotonic() - self.start) / (_TIMED - 1) + self.look_seconds / self.recipe.every
        return max(self.updates, int(60 * self.recipe.minutes / each))


class Rounding(Distilling):
    """The same for rounded layers: their codes keep to the bytes that they had; what is judged is what is stored."""

    def __init__(
        self, model: nn.Module, judge: Judge, recipe: Recipe, snapshots: Snapshots, loosened: Loosened
    ) -> None:
        self.loosened = loosened
        super().__init__(model, judge, recipe, snapshots)

    def optimizer_of(self, model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
        assert recipe.lr is not None
        latents = {"params": self.loosened.latents, "peak": _CODES * recipe.lr, "weight_decay": 0.0}
        vectors = {"params": self.loosened.vectors, "peak": _VECTORS * recipe.lr}
        return torch.optim.AdamW([latents, vectors], weight_decay=recipe.weight_decay)

    def schedule(self) -> None:
        super().schedule()
        self.loosened.press(self.optimizer.param_groups[0]["lr"])

    @contextmanager
    def judged(self) -> Iterator[nn.Module]:
        with super().judged() as model:
            self.loosened.settle()
            yield model


def width_of(model: nn.Module) -> int:
    """The number of inputs that most of its linears have: that of what runs from block to block."""
    found = Counter(m.in_features for m in model.modules() if isinstance(m, nn.Linear))
    return found.most_common(1)[0][0] if found else 768  # without any, as narrow a step as for a ViT-B


def rate(step: int, total: int | None, warmup: int) -> float:
    """Warm-up to 1 over at most half of all steps, then a cosine down to 0; 1 as long as `total` is not known."""
    whole = math.inf if total is None else total
    warm = min(warmup, whole / 2)
    if step < warm:
        return (step + 1) / (warm + 1)
    if total is None:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def _relative(expected: Tensor, found: Tensor, weight: float) -> Tensor:
    """`‖h − h̃‖² / ‖h − mean h‖²`, the mean over images and tokens; of several processes, this one's part of it."""
    expected, found = expected.detach().to(found.device).float(), found.float()
    centred = expected - processes.total(weight * expected.flatten(0, -2).mean(0))
    return (found - expected).square().sum() / processes.total(centred.square().sum()).clamp_min(1e-12)
