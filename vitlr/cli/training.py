"""Options of the commands that train, under the names of timm's train.py. Importing this costs no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitlr.errors import InputError

if TYPE_CHECKING:
    from torch import nn

Opt = Annotated[str, typer.Option(metavar="NAME", help="One of timm's optimizers.")]
Sched = Annotated[str, typer.Option(metavar="NAME", help="One of timm's schedules.")]
WarmupEpochs = Annotated[float, typer.Option(metavar="X", help="Epochs of rising rate.")]
Smoothing = Annotated[float, typer.Option(metavar="X", help="Label smoothing.")]
Mixup = Annotated[float, typer.Option(metavar="X", help="Mixup alpha, 0 for none.")]
Cutmix = Annotated[float, typer.Option(metavar="X", help="CutMix alpha, 0 for none.")]
AutoAugment = Annotated[str | None, typer.Option(metavar="POLICY", help="AutoAugment, such as rand-m9-mstd0.5.")]
ColorJitter = Annotated[float, typer.Option(metavar="X", help="Strength of colour jitter.")]
ClipGrad = Annotated[float | None, typer.Option(metavar="X", help="Largest norm of the gradient.")]
GradAccumSteps = Annotated[int, typer.Option(metavar="N", min=1, help="Batches in one update.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Of order, augmentation and dropout.")]
PeakLr = Annotated[float, typer.Option(metavar="X", help="Peak learning rate.")]
ValData = Annotated[str | None, typer.Option(metavar="TAR_OR_DIR", help="Held-out images that choose the best epoch.")]
Resume = Annotated[Path | None, typer.Option(metavar="DIR", help="Keep snapshots there, and go on from them.")]


def judge_on(data: str | None, model: nn.Module, options: dict[str, Any]) -> Callable[[nn.Module], float] | None:
    """What judges an epoch: top-1 on `--val-data`, opened for `model` with these options; None without."""
    if data is None:
        return None
    from vitlr.data.loader import open_data
    from vitlr.measuring.evaluation import evaluate

    images = open_data(data, model, **options)
    return lambda judged: evaluate(judged, images).top1


def check_files(data: str | None, out: Path | None, resume: Path | None) -> tuple[str, Path]:
    """Raise `InputError` where `--data` or `--out` is missing or `--resume` is no folder; the first two otherwise."""
    if data is None:
        raise InputError("--data is missing: give labelled images")
    if out is None:
        raise InputError("--out is missing: give a file to write")
    if resume is not None and resume.exists() and not resume.is_dir():
        raise InputError(f"--resume {resume} is a file, expected a folder")
    return data, out
