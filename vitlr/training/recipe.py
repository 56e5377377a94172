"""How to train, under the names of timm's train.py, checked before anything is read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from vitlr.errors import InputError

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
_CHOICES = {"clip_mode": ("norm", "value", "agc"), "mixup_mode": ("batch", "pair", "elem"), "keep": ("best", "last")}


@dataclass(frozen=True)
class TrainRecipe:
    """The choices behind a training; names and meanings are those of timm's train.py where it has them.

    epochs              passes over the images
    opt, lr, weight_decay, momentum, layer_decay   timm's optimizer factory; biases and norms are not decayed
    sched, warmup_epochs, warmup_lr, min_lr        timm's schedule, stepped with every update
    smoothing, mixup, cutmix, mixup_prob, mixup_switch_prob, mixup_mode   of the labels, and of images with labels
    clip_grad, clip_mode                           largest gradient (None: any); norm, value or agc
    grad_accum_steps    batches in one update
    model_ema, model_ema_decay, model_ema_warmup   running mean of the weights, which is then validated and returned
    amp                 bfloat16 autocast; None where it is known to pay (CUDA, and CPUs with AVX512-BF16 or AMX)
    distill_loss_weight w in `(1 - w) task + w T² KL(reference ‖ model)`, T = `distill_temperature`; with a reference
    scale, ratio, hflip, color_jitter, aa, reprob  timm's training transform; for the images of `vitlr.data.open_data`
    keep                "best" returns the epoch that `validate` liked best, "last" the last one
    recovery_interval   updates between two snapshots, besides one after every epoch
    seed                of order, augmentation, mixing and dropout
    """

    epochs: int = 10
    opt: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.05
    momentum: float = 0.9
    layer_decay: float | None = None
    sched: str = "cosine"
    warmup_epochs: float = 0.5
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    clip_grad: float | None = 1.0
    clip_mode: str = "norm"
    grad_accum_steps: int = 1
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = True
    amp: bool | None = None
    distill_loss_weight: float = 0.5
    distill_temperature: float = 1.0
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.4
    aa: str | None = None
    reprob: float = 0.0
    keep: str = "best"
    recovery_interval: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        from timm.optim import list_optimizers

        for key, low, high in _RANGES:
            value = getattr(self, key)
            if value is None and key in ("clip_grad", "layer_decay"):
                continue
            whole = isinstance(getattr(TrainRecipe, key), int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise InputError(f"{key}={value!r}, expected a {'whole ' if whole else ''}number")
            if not low <= value <= high:
                bound = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
                raise InputError(f"{key}={value}, expected {bound}")
        for key, known in {**_CHOICES, "sched": SCHEDULES}.items():
            if getattr(self, key) not in known:
                raise InputError(f"{key}={getattr(self, key)!r} is unknown, expected {', '.join(known)}")
        for key in ("amp", "model_ema", "model_ema_warmup"):
            value = getattr(self, key)
            if not isinstance(value, bool) and not (key == "amp" and value is None):
                raise InputError(f"{key}={value!r}, expected True or False")
        if self.opt not in list_optimizers():
            raise InputError(f"opt={self.opt!r} is unknown to timm; see timm.optim.list_optimizers(), such as adamw")
        if self.warmup_epochs >= self.epochs and self.sched != "constant":
            raise InputError(f"warmup_epochs={self.warmup_epochs:g} leaves nothing of {self.epochs} epochs; shorten it")
        for key in ("scale", "ratio"):
            pair = getattr(self, key)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] or (key == "scale" and pair[1] > 1):
                raise InputError(f"{key}={pair}, expected (low, high) with 0 < low <= high{' <= 1' * (key == 'scale')}")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


_TINY = 1e-12
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("epochs", 1, 1e6),
    ("lr", 0, 1e9),
    ("weight_decay", 0, 1e9),
    ("momentum", 0, 1),
    ("layer_decay", _TINY, 1),
    ("warmup_epochs", 0, 1e6),
    ("warmup_lr", 0, 1e9),
    ("min_lr", 0, 1e9),
    ("smoothing", 0, 1 - _TINY),
    ("mixup", 0, 1e9),
    ("cutmix", 0, 1e9),
    ("mixup_prob", 0, 1),
    ("mixup_switch_prob", 0, 1),
    ("clip_grad", _TINY, 1e30),
    ("grad_accum_steps", 1, math.inf),
    ("model_ema_decay", 0, 1 - _TINY),
    ("distill_loss_weight", 0, 1),
    ("distill_temperature", _TINY, 1e9),
    ("hflip", 0, 1),
    ("color_jitter", 0, 1),
    ("reprob", 0, 1),
    ("recovery_interval", 1, math.inf),
    ("seed", 0, 2**32 - 1),
)
