"""The files of a report: what each says of itself, and what is measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vitlr.checkpoint import files as checkpoint
from vitlr.checkpoint import folders
from vitlr.data.preprocessing import input_size
from vitlr.errors import InputError
from vitlr.measuring import cost
from vitlr.measuring.evaluation import evaluate
from vitlr.planning.plans import Plan
from vitlr.reporting.disagreement import Disagreement, Spotting
from vitlr.reporting.judging import Judge, Judged
from vitlr.reporting.speed import Speeds, by_engine
from vitlr.runtime.progress import Progress


@dataclass
class Subject:
    """One file: its model, what it says of itself, and what was measured of it."""

    name: str
    path: Path
    model: nn.Module
    plan: Plan | None
    recipe: dict[str, Any]
    costs: cost.Cost
    size: int
    judged: Judged | None = None
    measured_on: str = ""
    speeds: Speeds = field(default_factory=Speeds)  # of "small", and of "dense" where it takes the same images
    spotted: list[Disagreement] = field(default_factory=list)
    drawn: dict[str, Path] = field(default_factory=dict)


def opened(path: Path, name: str) -> Subject:
    """A file, and its model rebuilt."""
    model, path = checkpoint.load(path), folders.path_of(path)
    info: dict[str, Any] = model.vitlr_info  # type: ignore[assignment]
    try:
        plan = None if info.get("plan") is None else Plan.from_dict(info["plan"])
    except InputError:  # of learnt pruning, or of somebody's own
        plan = None
    recipe = info["recipe"] if isinstance(info.get("recipe"), dict) else {}
    size = path.stat().st_size
    return Subject(name, path, model, plan, recipe, cost.measure(model, input_size(model)), size)


def names_of(paths: Sequence[Path]) -> list[str]:
    """The files' names, with their folders where two are alike."""
    alone = len({path.name for path in paths}) == len(paths)
    return [path.name if alone else str(path) for path in paths]


def judge_subject(subject: Subject, judge: Judge | None, images: Any, count: int, progress: Progress | None) -> None:
    if judge is None:
        found = evaluate(subject.model, images, progress=progress)
        subject.judged = Judged(found.images, found.top1, found.top1_low, found.top1_high)
        return
    assert judge.recorded is not None
    spotting = Spotting(subject.model, judge.recorded, count if judge.logits else 0)
    subject.judged = judge.of(spotting, progress)
    subject.spotted = spotting.found


def time_subject(
    subject: Subject, dense: nn.Module | None, engines: Sequence[str], progress: Progress | None = None
) -> None:
    models = {"small": subject.model}
    size = input_size(subject.model)
    if dense is not None and input_size(dense) == size:
        models["dense"] = dense
    subject.speeds = by_engine(models, engines, size, progress)
