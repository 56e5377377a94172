"""A training by epochs: timm's optimizer, schedule and clipping, and what every epoch came to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.runtime.kinds import ANY_NUMBER, NONE, number, whole
from vitlr.runtime.snapshots import Snapshots, restore
from vitlr.training.recipe import TrainRecipe
from vitlr.training.report import Epoch, TrainReport
from vitlr.training.state import State

EPOCH = {
    "number": whole(1),
    **dict.fromkeys(("loss", "task", "lr"), ANY_NUMBER),
    **dict.fromkeys(("distillation", "penalty", "validation"), ANY_NUMBER | NONE),
}


class Epochs(State):
    """The state of one training, `per_epoch` updates an epoch; goes on from its snapshot where there is one."""

    values = (*State.values, "images", "seconds", "kept", "sums", "epochs")
    kinds: Mapping[str, Any] = {
        **State.kinds,
        "images": whole(0),
        "seconds": number(0),
        "kept": whole(0),
        "sums": {"*": number()},
        "epochs": [EPOCH],
    }

    def __init__(self, model: nn.Module, recipe: TrainRecipe, per_epoch: int, snapshots: Snapshots) -> None:
        super().__init__(model, _optimizer(model, recipe), snapshots, recipe.model_ema)
        self.recipe, self.per_epoch = recipe, per_epoch
        self.total = recipe.epochs * per_epoch
        self.rates = _schedule(self.optimizer, recipe, per_epoch)
        self.epochs: list[dict[str, Any]] = []
        self.images, self.kept, self.seconds = 0, 0, 0.0
        self.sums: dict[str, Tensor | float] = {}
        self.resume()
        self.began = time.monotonic() - self.seconds

    def schedule(self) -> None:
        self.rates.step_update(self.updates)

    def clip(self, parameters: list[nn.Parameter]) -> None:
        if self.recipe.clip_grad is not None:
            from timm.utils import dispatch_clip_grad

            dispatch_clip_grad(parameters, self.recipe.clip_grad, mode=self.recipe.clip_mode)

    def decay(self) -> float:
        """timm's: at first the weights themselves, then `1 - (1 + k)^(-2/3)` up to what the recipe says."""
        warm = 1 - (1 + self.updates) ** (-2 / 3) if self.recipe.model_ema_warmup else 1.0
        return min(warm, self.recipe.model_ema_decay) if self.updates else 0.0

    @property
    def lr(self) -> float:
        """The largest rate of all groups."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def end_epoch(self, validation: float | None) -> None:
        """Record the epoch, keep its weights if they are wanted, save."""
        means = {part: float(total) / self.per_epoch for part, total in self.sums.items()}
        epoch = Epoch(
            len(self.epochs) + 1,
            means.get("loss", 0.0),
            means.get("task", 0.0),
            means.get("distillation"),
            means.get("penalty"),
            self.lr,
            validation,
        )
        self.epochs.append(vars(epoch))
        self.sums = {}
        if self.judge(None if self.recipe.keep == "last" else validation):
            self.kept = epoch.number
        self.save()

    def finite(self) -> bool:
        """Whether all weights are numbers."""
        with self.judged() as model:
            return all(bool(torch.isfinite(p).all()) for p in model.parameters())

    def finish(self) -> TrainReport:
        """Leave the kept weights in the model, and say what happened."""
        restore(self.model, self.best)
        return TrainReport(
            tuple(Epoch(**epoch) for epoch in self.epochs),
            self.updates,
            self.images,
            round(time.monotonic() - self.began, 3),
            self.kept,
            self.note,
            self.recipe.to_dict(),
        )

    def save(self) -> None:
        self.seconds = time.monotonic() - self.began
        if self.snapshots.folder is not None:
            self.sums = {part: float(total) for part, total in self.sums.items()}
        super().save()


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
