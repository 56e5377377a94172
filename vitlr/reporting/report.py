"""One page about compressed models: what they cost, how right they are, where the budget went, where they err."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint.creation import remade
from vitlr.data.preprocessing import input_size
from vitlr.decomposition.solving import decompose
from vitlr.engines.names import check_engines, installed
from vitlr.errors import InputError
from vitlr.measuring import cost
from vitlr.planning.plans import Plan
from vitlr.reporting import disagreement, figures, sections
from vitlr.reporting.drawing import check_drawing
from vitlr.reporting.judging import Judge, Judged
from vitlr.reporting.layers import by_kind
from vitlr.reporting.page import MOST, page
from vitlr.reporting.rows import DENSE, VITLR, Row
from vitlr.reporting.subjects import Subject, judge_subject, names_of, opened, time_subject
from vitlr.runtime.places import atomic_path
from vitlr.runtime.progress import Progress, Watch, alone, shown

SHOWN = 48  # pictures on a page
POINTS = 64  # of a curve
WITH = ("torch", "vitlr")  # what every file is timed in


@alone
def report(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    validation: Iterable[Any] | None = None,
    reference: nn.Module | None = None,
    stats: Statistics | None = None,
    class_names: Sequence[str] | None = None,
    pictures: int = 12,
    engines: Sequence[str] | None = None,
    watch: Watch | None = None,
    progress: Progress | bool | None = None,
) -> Path:
    """Write `report.html`, one page that needs nothing else, and its figures as SVG beside it; the page's path.

    Of every file: what its plan kept where and lost as predicted, size, MACs, and milliseconds an image in float32 in
    plain torch, fused on vitlr's kernels, and in other `engines`, beside the dense model's: "onnxruntime", "openvino"
    and "compile", by default the first two where they are installed; one that cannot run a model is named. With
    `validation` images accuracy and its interval, with the dense model as `reference` agreement, KL and the `pictures`
    on which the two disagree most, and with `stats`, which the plan was made from, spectra with what was chosen.
    `class_names` are in the model's order. Raises `InputError` where matplotlib or an engine is missing, and for files
    and a folder that cannot be read or written.
    """
    check_drawing()
    others = installed() if engines is None else check_engines(engines, f"engines={engines!r}")
    timed = (*WITH, *(name for name in others if name not in WITH and (name != "compile" or engines is not None)))
    paths = [Path(path) for path in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    if not paths:
        raise InputError("files=() is empty; name some that vitlr wrote")
    if stats is not None and reference is None:
        raise InputError("stats= shows spectra of the dense model: give it as reference=")
    watch = watch or (lambda label, total=None, unit="images": shown(progress, label, total, unit))
    subjects = [opened(path, name) for path, name in zip(paths, names_of(paths), strict=True)]
    place = _folder(Path(folder))
    dense = reference if reference is not None else remade(subjects[0].model)
    judge = None if reference is None or validation is None else Judge(reference, validation)
    judged_dense = None
    if judge is not None:
        with watch("dense", getattr(validation, "images", None), "images") as advance:
            judged_dense = judge.of_dense(advance)
    each = min(pictures, SHOWN // len(subjects))
    for subject in subjects:
        if validation is not None:
            with watch(subject.name, getattr(validation, "images", None), "images") as advance:
                judge_subject(subject, judge, validation, each, advance)
        with watch(f"timing {subject.name}", None, "steps") as advance:
            time_subject(subject, dense, timed, advance)
        _draw(subject, place, reference, stats)
    rows = _rows(subjects, dense, judged_dense)
    overview = None
    if judged_dense is not None and len(subjects) > 1:  # one dot would be no figure
        overview = place / "accuracy.svg"
        figures.draw_frontier(rows, overview)
    texts = _texts(subjects, validation, reference, class_names)
    text = page("vitlr report", sections.all_of(subjects, rows, overview, texts))
    if len(text.encode()) > MOST:
        raise InputError(f"the page would take {len(text) / 1e6:.1f} MB; give fewer files, or fewer pictures=")
    with atomic_path(place / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return place / "report.html"


def _folder(place: Path) -> Path:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise InputError(f"cannot make the folder {place}: {cause.strerror or cause}; choose another one") from cause
    return place


def _draw(subject: Subject, place: Path, reference: nn.Module | None, stats: Statistics | None) -> None:
    if subject.plan is None:
        return
    stem = re.sub(r"[^\w.-]+", "_", subject.name.removesuffix(".safetensors"))
    subject.drawn = {kind: place / f"{stem}_{kind}.svg" for kind in ("kept", "losses")}
    figures.draw_kept(subject.plan, subject.drawn["kept"])
    figures.draw_losses(subject.plan, subject.drawn["losses"])
    if stats is not None and reference is not None:
        subject.drawn["spectra"] = place / f"{stem}_spectra.svg"
        figures.draw_spectra(_curves(subject.plan, reference, stats), subject.drawn["spectra"])


def _curves(plan: Plan, dense: nn.Module, stats: Statistics) -> dict[str, list[tuple[float, Any, int, int | None]]]:
    """Of every kind the errors of all ranks, thinned out, and what the plan chose."""
    objective = plan.objective if plan.objective in (*stats.objectives, "output") else None
    spectra = decompose(dense, stats, objective)
    curves: dict[str, list[tuple[float, Any, int, int | None]]] = {}
    for kind, rows in by_kind([row for row in plan.layers if row.name in spectra.layers]).items():
        deepest = max((block for block, _ in rows), default=0) or 1
        for block, row in rows:
            errors = spectra.layers[row.name].errors()
            full = len(errors) - 1
            ranks = sorted({round(i * full / POINTS) for i in range(POINTS + 1)} | {row.rank or full})
            points = [(rank, float(errors[rank])) for rank in ranks]
            curves.setdefault(kind, []).append((block / deepest, points, full, row.rank))
    return curves


def _rows(subjects: Sequence[Subject], dense: nn.Module | None, judged: Judged | None) -> list[Row]:
    """The rows of the first table, dense first where it is known."""
    rows = []
    if dense is not None:
        found = cost.measure(dense, input_size(dense))
        ms = subjects[0].speeds.least("dense", ("torch",))
        more = {"images": 0} if judged is None else judged.to_dict()
        rows.append(Row(DENSE, DENSE, found.bytes, params=found.params, macs=found.macs, ms=ms, speedup=1.0, **more))
    for subject in subjects:
        ms, slow = subject.speeds.least("small", WITH), subject.speeds.least("dense", ("torch",))
        more = {"images": 0} if subject.judged is None else subject.judged.to_dict()
        facts: dict[str, Any] = {"params": subject.costs.params, "macs": subject.costs.macs, "ms": ms, **more}
        method = None if subject.plan is None else subject.plan.method
        facts["speedup"] = None if ms is None or slow is None else slow / ms
        rows.append(Row(subject.name, VITLR, subject.size, method=method, **facts))
    return rows


def _texts(
    subjects: Sequence[Subject], images: Any, reference: nn.Module | None, names: Sequence[str] | None
) -> dict[str, Any]:
    """What the sections need besides: names of classes, how images are made, threads and machine."""
    spotted = [one for subject in subjects for one in subject.spotted]
    classes = 1 + max((c for one in spotted for c, _ in (*one.dense, *one.small)), default=0)
    if spotted and names is None and reference is not None:
        names = disagreement.class_names(reference, getattr(reference, "num_classes", 0))
    if names is not None and len(names) < classes:
        raise InputError(f"{len(names)} class names, and the model answers class {classes - 1}; give one a class")
    normal = disagreement.normalisation(images, subjects[0].model) if spotted else None
    return {"classes": names, "normal": normal, "threads": torch.get_num_threads(), "dense": reference is not None}
