"""What can be chosen for refinement, checked before any image is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vitlr.errors import InputError

RUNGS = ("refit", "regrow", "distil")
WORDS = {"residual": "regrow", "joint": "distil"}  # what rungs were called before: still understood, and read in files
RENAMED = {"residual_share": "regrow_share", "residual_steps": "regrow_steps"}  # and options


@dataclass(frozen=True)
class Recipe:
    """The choices behind a refinement; the defaults are those found on held-out calibration images of a ViT-Ti.

    seed            of the order of the images, their augmentation and all random starts
    batch_size      images in a step
    steps           of the rung distil, at most as many as `minutes` have room for, timed on the first ones
    lr              peak learning rate of AdamW, after `warmup` steps, then a cosine down to 0; `weight_decay`
    features        weight of the normalised squared error of the blocks' outputs beside the KL of the answers
    temperature     of the logits in that KL
    crop            smallest share of an image's area that a random crop keeps; `color_jitter` its strength
    mixup           mix images pairwise (mixup and cutmix in turn); the targets are the dense model's answers to the mix
    ema             decay of the running mean of the weights, which is what is judged and kept
    clip            largest norm of the gradient
    every           steps between two looks at the held-out images; after `patience` looks without gain it stops
    amp             bfloat16 autocast; None where it is known to pay (CUDA, and CPUs with AVX512-BF16 or AMX)
    regrow_share    share of a layer's rank that the rung regrow learns anew, `regrow_steps` its steps per layer,
                    `parallel` its inputs: those of the dense network, otherwise of the compressed one
    proxy_images    images that the refit and regrow look at (their tokens of one block are kept in memory)
    """

    seed: int = 0
    batch_size: int = 32
    steps: int | None = None
    minutes: float | None = None
    lr: float = 1e-4
    warmup: int = 20
    weight_decay: float = 0.0
    features: float = 50.0
    temperature: float = 1.0
    crop: float = 0.08
    color_jitter: float = 0.4
    mixup: bool = True
    ema: float = 0.99
    clip: float = 1.0
    every: int = 50
    patience: int = 10
    amp: bool | None = None
    regrow_share: float = 0.125
    regrow_steps: int = 200
    parallel: bool = False
    proxy_images: int = 64

    def __post_init__(self) -> None:
        for key, low, high in _RANGES:
            value = getattr(self, key)
            if value is None and key in ("steps", "minutes"):
                continue
            whole = isinstance(getattr(Recipe, key), int) or key == "steps"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise InputError(f"{key}={value!r}, expected a {'whole ' if whole else ''}number")
            if not low <= value <= high:
                bound = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
                raise InputError(f"{key}={value}, expected {bound}")

        for key in ("mixup", "parallel", "amp"):
            value = getattr(self, key)
            if not isinstance(value, bool) and not (key == "amp" and value is None):
                raise InputError(f"{key}={value!r}, expected True or False")

    @property
    def most_steps(self) -> int | None:
        """Steps of the rung distil, None where only the time says."""
        return 1000 if self.steps is None and self.minutes is None else self.steps


_TINY = 1e-12
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("seed", 0, 2**32 - 1),
    ("batch_size", 2, math.inf),
    ("steps", 1, math.inf),
    ("minutes", _TINY, 1e9),
    ("lr", 0, 1e9),
    ("warmup", 0, math.inf),
    ("weight_decay", 0, 1e9),
    ("features", 0, 1e9),
    ("temperature", _TINY, 1e9),
    ("crop", _TINY, 1),
    ("color_jitter", 0, 1),
    ("ema", 0, 1 - _TINY),
    ("clip", _TINY, 1e30),
    ("every", 1, math.inf),
    ("patience", 1, math.inf),
    ("regrow_share", _TINY, 1 - _TINY),
    ("regrow_steps", 1, math.inf),
    ("proxy_images", 8, math.inf),
)


def choices() -> set[str]:
    """The names of everything that can be chosen."""
    return {field.name for field in fields(Recipe)}


def make_recipe(options: dict[str, Any]) -> Recipe:
    """The recipe of these choices; `InputError` for one that is unknown or out of range."""
    options = {RENAMED.get(key, key): value for key, value in options.items()}
    unknown = set(options) - choices()
    if unknown:
        raise InputError(f"refine does not know {min(unknown)!r}; it takes {', '.join(sorted(choices()))}")
    return Recipe(**options)


def parse_rungs(rungs: str | Sequence[str]) -> tuple[str, ...]:
    """The rungs up to the named one ("distil" is all three, "none" none), or exactly those of a sequence, in order."""
    known = f"expected none, {', '.join(RUNGS)}"
    if isinstance(rungs, str):
        if rungs == "none":
            return ()
        last = WORDS.get(rungs, rungs)
        if last not in RUNGS:
            raise InputError(f"unknown rung {rungs!r}, {known}")
        return RUNGS[: RUNGS.index(last) + 1]
    rungs = [WORDS.get(rung, rung) for rung in rungs]
    unknown = [rung for rung in rungs if rung not in RUNGS]
    if unknown:
        raise InputError(f"unknown rung {unknown[0]!r}, {known}")
    return tuple(rung for rung in RUNGS if rung in rungs)
