"""What the commands that train share. Importing this costs no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitlr.errors import InputError

if TYPE_CHECKING:
    from torch import nn


def judge_on(data: str | None, model: nn.Module, options: dict[str, Any]) -> Callable[[nn.Module], float] | None:
    """What judges an epoch: top-1 on `--val-data`, opened for `model` with these options; None without."""
    if data is None:
        return None
    from vitlr.data.loader import open_data
    from vitlr.measuring.evaluation import evaluate

    images = open_data(data, model, **options)
    return lambda judged: evaluate(judged, images).top1 or 0.0


def check_files(data: str | None, out: Path | None, resume: Path | None) -> tuple[str, Path]:
    """Raise `InputError` where `--data` or `--out` is missing or `--resume` is no folder; the first two otherwise."""
    if data is None:
        raise InputError("--data is missing: give labelled images")
    if out is None:
        raise InputError("--out is missing: give a file to write")
    if resume is not None and resume.exists() and not resume.is_dir():
        raise InputError(f"--resume {resume} is a file, expected a folder")
    return data, out
