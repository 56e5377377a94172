"""The ablation moves one choice at a time, and its intervals are Student's."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
ablate = importlib.import_module("bench.compare.ablation")


def test_every_variant_is_one_step_from_the_default_or_from_joint_with_fisher():
    first, *others = ablate.variants(["refit", "all"], [64, 250])
    assert first == ablate.BASE and len({v.name for v in others}) == len(others) == 17
    assert ablate.BOTH in others
    for variant in others:
        centre = ablate.BOTH if variant.name.startswith(f"{ablate.BOTH.name},") else first
        moved = [key for key, value in asdict(variant).items() if value != asdict(centre)[key]]
        assert "name" in moved and (len(moved) == 2 or variant == ablate.BOTH), variant


def test_intervals():
    mean, half = ablate.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(ablate.interval([1.0])[1])
    assert ablate.STUDENT[8] == pytest.approx(2.262)  # nine degrees of freedom, ten seeds


def test_rows_that_are_kept_are_those_not_made_again(monkeypatch):
    monkeypatch.setattr(ablate, "ARGS", SimpleNamespace(images=[64]), raising=False)
    base, few, gone, common = ablate.BASE.name, "64 images", "gone", {"budget": "params:80%"}
    old = [{"variant": v, "seed": s, "of": "old", **common} for v in (few, gone) for s in (0, 1)]
    new = [{"variant": v, "seed": 1, "of": "new", **common} for v in (few, base)]
    assert [(r["variant"], r["seed"], r["of"]) for r in ablate.merged(old, new)] == [
        (base, 1, "new"),
        (few, 0, "old"),
        (few, 1, "new"),
        (gone, 0, "old"),
        (gone, 1, "old"),
    ]
