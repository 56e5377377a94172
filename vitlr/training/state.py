"""Where a training stands: weights, their running mean, the best of them, optimizer and schedule; saved and resumed."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.runtime.snapshots import Snapshots, copied, restore, stored
from vitlr.training.recipe import TrainRecipe
from vitlr.training.report import Epoch, TrainReport

_NAME = "state"
_KEPT = ("updates", "images", "seconds", "kept", "best_validation", "note", "sums")


class State:
    """One training of `model` in place, `per_epoch` updates an epoch; goes on from its snapshot where there is one."""

    def __init__(self, model: nn.Module, recipe: TrainRecipe, per_epoch: int, snapshots: Snapshots) -> None:
        self.model, self.recipe, self.per_epoch, self.snapshots = model, recipe, per_epoch, snapshots
        self.total = recipe.epochs * per_epoch
        self.optimizer = _optimizer(model, recipe)
        self.schedule = _schedule(self.optimizer, recipe, per_epoch)
        self.ema = _running_mean(model, recipe)
        self.best = copied(model)
        self.epochs: list[Epoch] = []
        self.updates, self.images, self.kept = 0, 0, 0
        self.seconds, self.best_validation, self.note = 0.0, -math.inf, ""
        self.sums: dict[str, float] = {}
        self._resume()
        self.began = time.monotonic() - self.seconds

    @property
    def over(self) -> bool:
        return bool(self.note) or self.updates >= self.total

    @property
    def judged(self) -> nn.Module:
        """What is validated and returned: the running mean where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        """The largest rate of all groups."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def update(self) -> None:
        """Clip, step, follow with the running mean; gradients are gone afterwards."""
        if self.recipe.clip_grad is not None:
            from timm.utils import dispatch_clip_grad

            trained = [p for p in self.model.parameters() if p.grad is not None]
            dispatch_clip_grad(trained, self.recipe.clip_grad, mode=self.recipe.clip_mode)
        self.schedule.step_update(self.updates)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates)

    def end_epoch(self, validation: float | None) -> None:
        """Record the epoch, keep its weights if they are wanted, save."""
        means = {part: total / self.per_epoch for part, total in self.sums.items()}
        epoch = Epoch(
            len(self.epochs) + 1,
            means.get("loss", 0.0),
            means.get("task", 0.0),
            means.get("distillation"),
            means.get("penalty"),
            self.lr,
            validation,
        )
        self.epochs.append(epoch)
        self.sums = {}
        best = validation is None or self.recipe.keep == "last" or validation > self.best_validation
        if best:
            self.best, self.kept = copied(self.judged), epoch.number
            self.best_validation = -math.inf if validation is None else validation
        self.save()

    def finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(torch.isfinite(p).all()) for p in self.judged.parameters())

    def finish(self) -> TrainReport:
        """Leave the kept weights in the model, and say what happened."""
        restore(self.model, self.best)
        return TrainReport(
            tuple(self.epochs),
            self.updates,
            self.images,
            round(time.monotonic() - self.began, 3),
            self.kept,
            self.note,
            self.recipe.to_dict(),
        )

    def save(self) -> None:
        if self.snapshots.folder is None:
            return
        self.seconds = time.monotonic() - self.began
        tensors = {f"weight.{name}": t for name, t in stored(self.model).items()}
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        if self.ema is not None:
            tensors |= {f"mean.{name}": t for name, t in stored(self.ema.module).items()}
        moments, plain = _optimizer_state(self.optimizer)
        state = {key: getattr(self, key) for key in _KEPT if key != "best_validation"}
        state["best_validation"] = None if self.best_validation == -math.inf else self.best_validation
        state |= {"epochs": [vars(epoch) for epoch in self.epochs], "optimizer": plain}
        self.snapshots.save(_NAME, tensors | moments, state)

    def _resume(self) -> None:
        found = self.snapshots.load(_NAME)
        if found is None:
            return
        tensors, state = found
        for key in _KEPT:
            setattr(self, key, state[key])
        self.best_validation = -math.inf if self.best_validation is None else self.best_validation
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        restore(self.model, _under("weight.", tensors))
        device = next(self.model.parameters()).device
        self.best = {name: tensor.to(device) for name, tensor in _under("best.", tensors).items()}
        if self.ema is not None:
            restore(self.ema.module, _under("mean.", tensors))
        _restore_optimizer(self.optimizer, _under("optimizer.", tensors), state["optimizer"])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _optimizer(model: nn.Module, recipe: TrainRecipe) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(
            model,
            opt=recipe.opt,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            layer_decay=recipe.layer_decay,
        )
    except (AssertionError, AttributeError, ImportError, TypeError, ValueError) as cause:
        raise InputError(f"timm makes no optimizer {recipe.opt!r} for this model: {cause}; try opt='adamw'") from cause


def _schedule(optimizer: torch.optim.Optimizer, recipe: TrainRecipe, per_epoch: int) -> Any:
    from timm.scheduler import create_scheduler_v2

    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.sched,
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,  # type: ignore[arg-type]
        warmup_lr=min(recipe.warmup_lr, recipe.lr),
        min_lr=recipe.min_lr,
        step_on_epochs=False,
        updates_per_epoch=per_epoch,
    )
    return schedule


def _running_mean(model: nn.Module, recipe: TrainRecipe) -> Any:
    if not recipe.model_ema:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and everything else as JSON values, which keep floats to the bit."""
    body = optimizer.state_dict()
    items = [(index, key, value) for index, state in body["state"].items() for key, value in state.items()]
    tensors = {f"optimizer.{index}.{key}": value for index, key, value in items if isinstance(value, Tensor)}
    numbers = [[index, key, value] for index, key, value in items if not isinstance(value, Tensor)]
    groups = [
        {key: value for key, value in g.items() if key != "params" and _plain(value)} for g in body["param_groups"]
    ]
    return tensors, {"numbers": numbers, "groups": groups}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        p = parameters[int(index)]
        optimizer.state[p][key] = tensor.to("cpu" if key == "step" else p.device)
    for index, key, value in plain["numbers"]:
        optimizer.state[parameters[index]][key] = value
    for group, kept in zip(optimizer.param_groups, plain["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in kept.items()})


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
