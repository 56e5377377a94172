"""How to train, under the names of timm's train.py, checked before anything is read; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from vitlr.errors import InputError
from vitlr.runtime.fields import Options, option

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")


@dataclass(frozen=True)
class TrainRecipe(Options):
    """The choices behind a training; names and meanings are those of timm's train.py where it has them."""

    epochs: int = option(10, "Passes over the images.", low=1, high=1e6, metavar="N")
    lr: float = option(1e-4, "Peak learning rate.", low=0, metavar="X")
    opt: str = option("adamw", "One of timm's optimizers.", metavar="NAME")
    weight_decay: float = option(0.05, "Of weights, not of biases, norms and gates.", low=0, metavar="X")
    momentum: float = option(0.9, "Of optimizers that have one.", low=0, high=1, flag="")
    layer_decay: float | None = option(
        None, "Factor of the rate from a layer to the one below.", above=0, high=1, flag=""
    )
    sched: str = option(
        "cosine", "One of timm's schedules, stepped with every update.", among=SCHEDULES, metavar="NAME"
    )
    warmup_epochs: float = option(0.5, "Epochs of rising rate.", low=0, metavar="X")
    warmup_lr: float = option(1e-6, "Rate that they start from.", low=0, flag="")
    min_lr: float = option(0.0, "Rate at the end.", low=0, metavar="X")
    smoothing: float = option(0.1, "Label smoothing.", low=0, below=1, metavar="X")
    mixup: float = option(0.0, "Mixup alpha, 0 for none.", low=0, metavar="X")
    cutmix: float = option(0.0, "CutMix alpha, 0 for none.", low=0, metavar="X")
    mixup_prob: float = option(1.0, "Probability of either.", low=0, high=1, flag="")
    mixup_switch_prob: float = option(0.5, "Probability of CutMix where both are on.", low=0, high=1, flag="")
    mixup_mode: str = option("batch", "What is mixed at once.", among=("batch", "pair", "elem"), flag="")
    clip_grad: float | None = option(1.0, "Largest norm of the gradient.", above=0, metavar="X")
    clip_mode: str = option("norm", "What that limits.", among=("norm", "value", "agc"), flag="")
    grad_accum_steps: int = option(1, "Batches in one update.", low=1, metavar="N")
    model_ema: bool = option(False, "Validate and keep the running mean of the weights.")
    model_ema_decay: float = option(0.9998, "Its decay.", low=0, below=1, metavar="X")
    model_ema_warmup: bool = option(True, "Let that decay rise from 0.", flag="")
    amp: bool | None = option(
        None, "bfloat16 autocast; None where it pays (CUDA, and CPUs with AVX512-BF16 or AMX).", flag=""
    )
    distill_loss_weight: float = option(
        0.5, "w in (1 - w) task + w T² KL(reference ‖ model), with a reference.", low=0, high=1, metavar="W"
    )
    distill_temperature: float = option(1.0, "T of it.", above=0, flag="")
    scale: tuple[float, float] = option((0.08, 1.0), "Shares of an image's area that random crops keep.", flag="")
    ratio: tuple[float, float] = option((3 / 4, 4 / 3), "Their aspect ratios.", flag="")
    hflip: float = option(0.5, "Probability of a flip.", low=0, high=1, flag="")
    color_jitter: float = option(0.4, "Strength of colour jitter.", low=0, high=1, metavar="X")
    aa: str | None = option(None, "AutoAugment, such as rand-m9-mstd0.5.", metavar="POLICY")
    reprob: float = option(0.0, "Probability of random erasing.", low=0, high=1, metavar="P")
    keep: str = option(
        "best", "The epoch to return: that which held-out images like best, or last.", among=("best", "last"), flag=""
    )
    recovery_interval: int = option(
        500, "Updates between two snapshots, besides one after every epoch.", low=1, flag=""
    )
    seed: int = option(0, "Of order, augmentation, mixing and dropout.", low=0, high=2**32 - 1, metavar="N")

    def check(self) -> None:
        """Raise `InputError` for optimizers that timm has not, a warm-up without end, and ranges that are none."""
        from timm.optim import list_optimizers

        if self.opt not in list_optimizers():
            raise InputError(f"opt={self.opt!r} is unknown to timm; see timm.optim.list_optimizers(), such as adamw")
        if self.warmup_epochs >= self.epochs and self.sched != "constant":
            raise InputError(f"warmup_epochs={self.warmup_epochs:g} leaves nothing of {self.epochs} epochs; shorten it")
        for key, high in (("scale", 1.0), ("ratio", float("inf"))):
            pair = getattr(self, key)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= high:
                raise InputError(
                    f"{key}={pair}, expected (low, high) with 0 < low <= high{' <= 1' if high == 1 else ''}"
                )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0
