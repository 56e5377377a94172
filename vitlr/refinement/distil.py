"""The third rung: all factors, biases and norms trained together against the dense model, without labels."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.data.batches import to_model
from vitlr.measuring.losses import check_reached, divergence, first_tensor
from vitlr.nn import LowRankLinear
from vitlr.refinement.blocks import by_block, watched
from vitlr.refinement.images import Proxy
from vitlr.refinement.judge import Judge
from vitlr.refinement.recipe import Recipe
from vitlr.refinement.snapshots import Snapshots
from vitlr.runtime.contexts import autocast, evaluation_mode, plain_attention
from vitlr.runtime.modules import device_of
from vitlr.runtime.progress import Progress

_TIMED = 6  # steps after which `minutes` becomes a number of steps
_NO_END = 2**62
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


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
    """
    for module in model.modules():
        if isinstance(module, LowRankLinear) and all(p.requires_grad for p in module.parameters()):
            module.balance()
    run = _Run(model, judge, recipe, snapshots)
    names = list(by_block(model)) if recipe.features else []
    blocks: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    device = device_of(model)

    def loss_of(images: Tensor) -> Tensor:
        with autocast(device, recipe.amp):
            with torch.no_grad():
                expected = first_tensor(reference(to_model(reference, images)))
            answers = first_tensor(model(to_model(model, images)))
        loss = divergence(expected.to(answers.device).float(), answers.float(), judge.logits, recipe.temperature)
        for name in names:
            loss = loss + recipe.features / len(names) * _relative(blocks[0][name], blocks[1][name])
        return loss

    with (
        torch.enable_grad(),
        evaluation_mode(model),
        evaluation_mode(reference),
        plain_attention(model, reference),
        watched(reference, names, lambda name, x, y: blocks[0].__setitem__(name, y)),
        watched(model, names, lambda name, x, y: blocks[1].__setitem__(name, y)),
    ):
        batches = proxy.mixed(recipe.batch_size, recipe.seed, run.step, recipe.crop, recipe.color_jitter, recipe.mixup)
        while not run.over:
            images = next(batches)
            if len(images):
                run.take(loss_of(images))
            run.step += 1
            run.look()
            progress(run.step, run.total)
    run.finish()
    return run.step, run.note


class _Run:
    """The state of training: weights, their running mean, the best of it, the optimiser, the step."""

    def __init__(self, model: nn.Module, judge: Judge, recipe: Recipe, snapshots: Snapshots) -> None:
        self.model, self.judge, self.recipe, self.snapshots = model, judge, recipe, snapshots
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.weights.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.mean = [p.detach().clone() for p in self.parameters]
        self.best = [p.detach().clone() for p in self.parameters]
        self.step, self.total, self.since_best = 0, recipe.most_steps, 0
        self.note, self.seconds = "", 0.0
        self.curve: list[list[float]] = []
        self.start = time.monotonic()
        if not self._resume():
            self.best_kl = judge(model).kl
            self.curve.append([0, self.best_kl])
        self.look_seconds = time.monotonic() - self.start

    @property
    def over(self) -> bool:
        return bool(self.note) or (self.total is not None and self.step >= self.total)

    def take(self, loss: Tensor) -> None:
        """One step of AdamW; a loss that is no number leaves the weights alone and ends the run."""
        check_reached(loss)
        if not math.isfinite(float(loss.detach())):
            self.note = f"the loss was {float(loss.detach())} at step {self.step + 1}: stopped, kept the best before it"
            return
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * self._schedule()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # The mean of the first steps would otherwise remember the start for too long.
        decay = min(self.recipe.ema, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1 - decay)

    def look(self) -> None:
        """Every now and then: judge the running mean, keep it if it is the best, save a snapshot."""
        if self.step == 1:
            self.start = time.monotonic()  # the first step starts workers and fills caches
        if self.step == _TIMED and self.recipe.minutes is not None:
            self.total = min(self._affordable(self.recipe.minutes), self.total or self.recipe.most_steps or _NO_END)
        if self.note or not (self.over or self.step % self.recipe.every == 0):
            return
        raw = [p.detach().clone() for p in self.parameters]
        self._set(self.mean)
        kl = self.judge(self.model).kl
        self._set(raw)
        self.curve.append([self.step, kl])
        if kl < self.best_kl:
            self.best_kl, self.since_best = kl, 0
            self.best = [mean.clone() for mean in self.mean]
        else:
            self.since_best += 1
            if self.since_best >= self.recipe.patience:
                self.note = f"no gain on held-out images for {self.since_best} looks: stopped early"
        self._save()

    def finish(self) -> None:
        """Leave the best weights in the model."""
        self._set(self.best)

    def _schedule(self) -> float:
        """Warm-up to 1, then a cosine down to 0."""
        total = math.inf if self.total is None else self.total
        warm = min(self.recipe.warmup, total / 2)
        if self.step < warm:
            return (self.step + 1) / (warm + 1)
        if self.total is None:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (self.step - warm) / max(self.total - warm, 1)))

    def _affordable(self, minutes: float) -> int:
        each = (time.monotonic() - self.start) / (_TIMED - 1) + self.look_seconds / self.recipe.every
        return max(self.step, int(60 * minutes / each))

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)

    def _save(self) -> None:
        if self.snapshots.folder is None:
            return
        tensors: dict[str, Tensor] = {}
        for i, name in enumerate(self.weights):
            p = self.parameters[i]
            tensors |= {f"weight.{name}": p, f"mean.{name}": self.mean[i], f"best.{name}": self.best[i]}
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state.get(p, {}).items()}
        state: dict[str, Any] = {key: getattr(self, key) for key in _STATE}
        self.snapshots.save("distil", tensors, state)

    def _resume(self) -> bool:
        found = self.snapshots.load("distil")
        if found is None:
            return False
        tensors, state = found
        for key in _STATE:
            setattr(self, key, state[key])
        for i, name in enumerate(self.weights):
            p = self.parameters[i]
            self.mean[i].copy_(tensors[f"mean.{name}"])
            self.best[i].copy_(tensors[f"best.{name}"])
            with torch.no_grad():
                p.copy_(tensors[f"weight.{name}"])
            if f"step.{name}" in tensors:
                moved = {key: tensors[f"{key}.{name}"] for key in _MOMENTS}
                self.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moved.items()}
        return True


_STATE = ("step", "total", "since_best", "best_kl", "curve", "note")


def _relative(expected: Tensor, found: Tensor) -> Tensor:
    """`‖h − h̃‖² / ‖h − mean h‖²`, the mean over images and tokens."""
    expected, found = expected.detach().to(found.device).float(), found.float()
    centred = expected - expected.flatten(0, -2).mean(0)
    return (found - expected).square().sum() / centred.square().sum().clamp_min(1e-12)
