"""One calibration, many budgets: what each costs in accuracy, and what it brings in bytes and time."""

from __future__ import annotations

import os
import re
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitlr.calibration.loop import calibrate
from vitlr.calibration.options import RANGES, ROUNDING
from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint import files
from vitlr.checkpoint.origins import why_not_rebuilt
from vitlr.compression import record
from vitlr.data.loader import Loader
from vitlr.errors import InputError, VitlrError
from vitlr.measuring import cost
from vitlr.planning.budgets import Budget, counted
from vitlr.planning.planner import plan
from vitlr.reporting.advice import advice, table
from vitlr.reporting.judging import Judge
from vitlr.reporting.nearest import GROUP, nearest
from vitlr.reporting.rows import DENSE, INT8, PLAIN, VITLR, Kept, Row, key_of
from vitlr.reporting.speed import milliseconds
from vitlr.runtime.machine import processor
from vitlr.runtime.modules import like, uncompiled
from vitlr.runtime.progress import Progress, Watch, alone, shown
from vitlr.runtime.storage import digest
from vitlr.surgery.application import apply
from vitlr.surgery.fusion import fuse

BUDGETS = ("bytes:25%", "bytes:15%", "bytes:12%", "bytes:10%", "params:80%", "params:60%")
ROUNDED = {"plain int8": (8, None), "plain int4": (4, GROUP)}  # to the nearest: bits, and weights in a group
BYTES = "int8 (fuse bits=8)"
Made = tuple[nn.Module, int, dict[str, Any]]  # a model, bytes of its file, and what else its row says


@dataclass(frozen=True)
class Frontier:
    """All rows, the dense one first, and what could not be had, by budget; `str` is the table and the advice."""

    rows: tuple[Row, ...]
    refused: dict[str, str]
    points: float | None = None

    @property
    def advice(self) -> str:
        """The smallest and the fastest that lose no more than `points`, in one line."""
        return advice(self.rows, self.points)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"rows": [row.to_dict() for row in self.rows], "refused": self.refused, "advice": self.advice}

    def draw(self, path: str | os.PathLike[str]) -> None:
        """The figure, as SVG or PNG by the name; needs matplotlib (`vitlr[figures]`)."""
        from vitlr.reporting.figures import draw_frontier

        draw_frontier(self.rows, Path(path))

    def __str__(self) -> str:
        lines = [table(self.rows), "", textwrap.fill(self.advice, 80)]
        return "\n".join([*lines, *(textwrap.fill(f"{name}: {why}", 80) for name, why in self.refused.items())])


@alone
def frontier(
    model: nn.Module,
    calibration: Iterable[Any],
    validation: Iterable[Any],
    budgets: Sequence[str | Budget] = BUDGETS,
    *,
    folder: str | os.PathLike[str] | None = None,
    points: float | None = None,
    rivals: bool = True,
    watch: Watch | None = None,
    progress: Progress | bool | None = None,
) -> Frontier:
    """Compress to every budget from one calibration, and judge each on images that were not calibrated on.

    Beside them stand the dense model and, with `rivals`, plain rounding to 8 bits a row and to 4 bits in groups of 64,
    and the dense model multiplying bytes. `validation` may have labels or not: see `Judged`. Milliseconds are those of
    one image on the model's device, fused, in turns with dense; of plain rounding there are none, it runs as dense.
    `points` of top-1 (by default 0.5; of agreement 2, of 100 x cosine 1) may be lost in the advice. `folder` keeps
    statistics, models and rows: what is there of the same model, images, budget, version and machine is not measured
    again. A budget that cannot be reached is told in `refused`.
    Raises `InputError` for budgets that cannot be read, before an image is, and what calibration raises.
    """
    model = uncompiled(model)
    wanted = [counted(budget) for budget in budgets]
    if not wanted:
        raise InputError("budgets=() is empty; give some, such as bytes:25%")
    watch = watch or (lambda label, total=None, unit="images": shown(progress, label, total, unit))
    with _place(folder) as place:
        run = _Run(model, calibration, validation, place, Kept(place if folder is not None else None), watch)
        rows, refused = [run.dense()], {}
        run.dense_ms = rows[0].ms
        makes: dict[str, tuple[str, Callable[[], Made]]] = {}
        makes |= {str(b): (VITLR, lambda b=b: run.small(b)) for b in wanted}  # type: ignore[misc]
        if rivals:
            makes[BYTES] = (INT8, run.bytes)
            makes |= {name: (PLAIN, lambda how=how: (*nearest(model, *how), {})) for name, how in ROUNDED.items()}  # type: ignore[misc]
        for name, (kind, make) in makes.items():
            try:
                rows.append(run.row(name, kind, make))
            except VitlrError as cause:
                if kind == PLAIN or run.statistics is None:  # the images or the model are at fault, not the budget
                    raise
                refused[name] = str(cause)
    return Frontier(tuple(rows), refused, points)


class _Run:
    """What rows share: the model, its images, one calibration, and spectra by objective."""

    def __init__(self, model: nn.Module, calibration: Any, validation: Any, place: Path, kept: Kept, watch: Watch):
        self.model, self.calibration, self.place, self.kept, self.watch = model, calibration, place, kept, watch
        self.judge = Judge(model, validation)
        self.images = getattr(validation, "images", None)
        self.statistics: Statistics | None = None
        self.spectra: dict[str, Any] = {}
        self.dense_ms: float | None = None
        state = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
        from vitlr import __version__

        facts = [__version__, digest(state, type(model).__qualname__), torch.get_num_threads(), processor()]
        self.facts = [*facts, str(like(model).device), _listing(validation)]

    def key(self, name: str, calibrated: bool) -> str | None:
        """What a row is kept under; None where nothing tells its images from others."""
        listing = _listing(self.calibration) if calibrated else "none"
        return None if None in (listing, self.facts[-1]) else key_of(name, listing, *self.facts)

    def dense(self) -> Row:
        """The model as it is."""
        key = self.key(DENSE, calibrated=False)
        found = self.kept.get(key)
        if found is not None:
            return found
        with self.watch("dense", self.images, "images") as progress:
            judged = self.judge.of_dense(progress)
        size = self._image()
        facts = cost.measure(self.model, size) if size is not None else None
        ms = milliseconds({"dense": self.model}, size)["dense"] if size is not None else None
        row = Row(DENSE, DENSE, cost.count_bytes(self.model), **judged.to_dict(), ms=ms, key=key)
        row = _with(row, speedup=None if ms is None else 1.0, params=cost.count_params(self.model))
        row = row if facts is None else _with(row, macs=facts.macs)
        self.kept.add(row)
        return row

    def row(self, name: str, kind: str, make: Callable[[], Made]) -> Row:
        """A model made smaller: measured, or kept from an earlier run."""
        key = self.key(name, calibrated=kind != PLAIN)
        found = self.kept.get(key)
        if found is not None:
            return found
        small, size, more = make()
        if self.judge.replays and self.judge.recorded is None:  # its row was kept, its answers were not
            with self.watch(DENSE, self.images, "images") as progress:
                self.judge.of_dense(progress)
        with self.watch(name, self.images, "images") as progress:
            judged = self.judge.of(small, progress)
        row = Row(name, kind, size, **judged.to_dict(), key=key, params=cost.count_params(small))
        if kind != PLAIN:
            row = _with(row, **self._times(small if kind == INT8 else fuse(small)))
        row = _with(row, **more)
        self.kept.add(row)
        return row

    def small(self, budget: Budget) -> Made:
        """What a budget gives, and its file."""
        objective = "loss" if budget.quantity == "bytes" else "fisher"
        stats = self.calibrated()
        with self.watch(f"{budget}: solving", None, "layers") as progress:
            known = self.spectra.get(objective)
            chosen = plan(self.model, stats, budget, objective=objective, spectra=known, progress=progress)
        self.spectra[objective] = chosen.spectra
        with self.watch(f"{budget}: changing", None, "layers") as progress:
            small = apply(self.model, chosen, progress=progress)
        record(small, chosen, stats, 1, stats.images)
        path = self.place / f"{re.sub(r'[^0-9A-Za-z.]+', '_', str(budget)).strip('_')}.safetensors"
        files.save(small, path, model_args=False if why_not_rebuilt(self.model) is not None else None)
        facts = {"macs": chosen.macs_kept, "method": chosen.method, "file": path.name}
        return small, path.stat().st_size, {**facts, "rounds_only": not chosen.ranks and not chosen.narrowed}

    def bytes(self) -> Made:
        """The dense model multiplying bytes, in the ranges that calibration saw."""
        stats = self.calibrated()
        with self.watch("rounding to bytes", len(stats.layers), "layers") as progress:
            small = fuse(self.model, bits=8, stats=stats, progress=progress)
        return small, cost.count_bytes(small), {"rounds_only": True}

    def calibrated(self) -> Statistics:
        """One calibration for all, kept in the folder and gone on from where it was cut short."""
        if self.statistics is None:
            how: dict[str, Any] = {"objective": ("fisher", "loss"), "extras": (ROUNDING, RANGES)}
            path = None if self.kept.path is None else self.place / "statistics.safetensors"
            with self.watch("calibrating", getattr(self.calibration, "images", None), "images") as progress:
                self.statistics = calibrate(self.model, self.calibration, resume=path, progress=progress, **how)
        return self.statistics

    def _image(self) -> tuple[int, ...] | None:
        """The size of one image, as validation gives it; None for models that take several tensors."""
        for batch in self.judge.images:
            first = batch[0] if isinstance(batch, (tuple, list)) else batch
            return tuple(first.shape[1:]) if isinstance(first, torch.Tensor) else None
        return None

    def _times(self, small: nn.Module) -> dict[str, float]:
        """Milliseconds an image, and how many times faster than dense, in turns."""
        size = self._image()
        if size is None:
            return {}
        ms = milliseconds({"dense": self.model, "small": small}, size)
        speedup = ms["dense"] / ms["small"]
        # A machine is busier in one race than in another, so that only the ratio is comparable from row to row.
        return {"ms": (self.dense_ms or ms["dense"]) / speedup, "speedup": speedup}


@contextmanager
def _place(folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The folder that was named, made if need be, or one that vanishes."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="vitlr-frontier-") as temporary:
            yield Path(temporary)
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise InputError(f"cannot make the folder {folder}: {cause.strerror or cause}; choose another one") from cause
    yield Path(folder)


def _listing(images: Any) -> str | None:
    """What tells a data set from another one, preprocessing included; None where nothing does."""
    return f"{images.listing} {images.images} {images.made}" if isinstance(images, Loader) else None


def _with(row: Row, **changes: Any) -> Row:
    return Row(**{**vars(row), **changes})
