"""What vitlr does, through the calls that a user would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import vitlr
from bench.compare.frontier.rivals import Made, Make
from bench.compare.frontier.subjects import Subject

HEADER = 42e3  # bytes of a file beside the numbers: names and the plan
SIZES = {"vit_tiny": (5.6, 3.4, 2.8, 2.3, 1.8), "dinov2": (20.0, 12.0, 9.4, 6.8)}  # MB of the whole file


def small(megabytes: float, method: str) -> Make:
    """A file of so many megabytes, read back; one calibration serves all sizes and methods."""

    def make(subject: Subject, folder: Path) -> Made:
        budget = f"bytes:{megabytes * 1e6 - HEADER:.0f}"
        known = subject.spectra.get(method)
        plan = vitlr.plan(subject.model, statistics(subject, folder), budget, method=method, spectra=known)
        subject.spectra[method] = plan.spectra
        path = folder / "model.safetensors"
        vitlr.save(vitlr.apply(subject.model, plan), path, plan=plan)
        return vitlr.load(path), path.stat().st_size, {"predicted": plan.error}

    return make


def statistics(subject: Subject, folder: Path) -> vitlr.Statistics:
    """Of all calibration images, of an earlier run where there was one."""
    path = folder / "statistics.safetensors"
    if not path.is_file():
        how: dict[str, Any] = {"objective": "loss", "extras": ("rounding",), "hidden": True}
        vitlr.calibrate(subject.model, subject.images, **how).save(path)
    return vitlr.Statistics.load(path)


def ours(subject: str) -> dict[str, Make]:
    """All rows of vitlr, by their names."""
    rows: dict[str, Make] = {}
    for size in SIZES[subject]:
        rows[f"vitlr bits, {size:g} MB"] = small(size, "bits")
        rows[f"vitlr mixed, {size:g} MB"] = small(size, "mix")
    return rows
