"""What can be chosen for refinement, checked before any image is read; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitlr.errors import InputError
from vitlr.runtime.fields import Options, option
from vitlr.runtime.words import newer

RUNGS = ("refit", "regrow", "distil")
EVERY = ("rescale", *RUNGS)
WORDS = {"residual": "regrow", "joint": "distil"}  # what rungs were called before: still understood, and read in files
RENAMED = {"residual_share": "regrow_share", "residual_steps": "regrow_steps"}  # and options, in snapshots


@dataclass(frozen=True)
class Recipe(Options):
    """The choices behind a refinement; the defaults are those found on held-out calibration images of a ViT-Ti."""

    steps: int | None = option(
        None,
        "Steps of all rungs together: modules refitted, layers regrown, updates distilled. "
        "[default: 1000 of distil, or what --minutes have room for]",
        low=1,
        metavar="N",
    )
    minutes: float | None = option(None, "Time for all rungs together.", above=0, metavar="T")
    lr: float | None = option(
        None,
        "Peak learning rate of distil, of AdamW, then a cosine down to 0. [default: 0.01 over the model's width, so "
        "5e-5 for 192; of rounded weights 5e-5]",
        low=0,
        metavar="X",
    )
    seed: int = option(0, "Of order, augmentation and random starts.", low=0, high=2**32 - 1, metavar="N")
    batch_size: int = option(32, "Images in a step.", low=2, flag="")
    warmup: int = option(20, "Steps of rising rate.", low=0, flag="")
    weight_decay: float = option(0.0, "Of AdamW.", low=0, flag="")
    features: float = option(
        50.0, "Weight of the blocks' normalised squared error beside the KL of the answers.", low=0, flag=""
    )
    temperature: float = option(1.0, "Of the logits in that KL.", above=0, flag="")
    crop: float = option(0.08, "Smallest share of an image's area that a random crop keeps.", above=0, high=1, flag="")
    color_jitter: float = option(0.4, "Strength of colour jitter.", low=0, high=1, flag="")
    mixup: bool = option(True, "Mix images pairwise; the targets are the dense model's answers to the mix.", flag="")
    ema: float = option(
        0.99, "Decay of the running mean of the weights, which is judged and kept.", low=0, below=1, flag=""
    )
    clip: float = option(1.0, "Largest norm of the gradient.", above=0, flag="")
    every: int = option(50, "Steps between two looks at the held-out images.", low=1, flag="")
    patience: int = option(10, "Looks without gain after which it stops.", low=1, flag="")
    amp: bool | None = option(
        None, "bfloat16 autocast; None where it pays (CUDA, and CPUs with AVX512-BF16 or AMX).", flag=""
    )
    regrow_share: float = option(
        0.125, "Share of a layer's rank that regrow learns anew.", above=0, below=1, flag="", was="residual_share"
    )
    regrow_steps: int = option(200, "Its steps for a layer.", low=1, flag="", was="residual_steps")
    parallel: bool = option(False, "Its inputs are those of the dense network, not of the compressed one.", flag="")
    proxy_images: int = option(64, "Images that refit and regrow look at, kept in memory.", low=8, flag="")

    @property
    def most_steps(self) -> int | None:
        """Steps of the rung distil, None where only the time says."""
        return 1000 if self.steps is None and self.minutes is None else self.steps


def parse_rungs(rungs: str | Sequence[str]) -> tuple[str, ...]:
    """The rungs up to the named one ("distil" is three, "none" none), or exactly those of a sequence, in order.

    "rescale" is that one alone: none of the others needs it.
    """
    known = f"expected none, {', '.join(EVERY)}"
    if isinstance(rungs, str):
        if rungs == "none":
            return ()
        last = newer(rungs, WORDS)
        if last not in EVERY:
            raise InputError(f"unknown rung {rungs!r}, {known}")
        return (last,) if last not in RUNGS else RUNGS[: RUNGS.index(last) + 1]
    rungs = [newer(rung, WORDS) for rung in rungs]
    unknown = [rung for rung in rungs if rung not in EVERY]
    if unknown:
        raise InputError(f"unknown rung {unknown[0]!r}, {known}")
    return tuple(rung for rung in EVERY if rung in rungs)
