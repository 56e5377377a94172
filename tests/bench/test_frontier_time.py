"""Accuracy against milliseconds: rows that are there, rows that cannot be, the page and the figure."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vitlr.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
pytest.importorskip("bench.compare.frontier_time", reason="bench/ is not beside the tests")
from bench.compare.frontier_time import __main__ as program
from bench.compare.frontier_time.figure import draw
from bench.compare.frontier_time.page import BASE, INT8, markdown
from bench.compare.frontier_time.rows import ROWS, SAME, images
from bench.compare.frontier_time.subjects import Noise

MACHINE = {"processor": "one", "threads": 1, "torch": "2", "date": "2026-01-01"}


def row(top1, eight, one):
    times = {"8": {"ms": eight, "median": eight, "rounds": 5}, "1": {"ms": one, "median": one, "rounds": 5}}
    return {"figures": {"top1": top1}, "times": times}


@pytest.fixture
def body():
    rows = {BASE: row(82.5, 400.0, 50.0), INT8: row(82.0, 100.0, 20.0), "vitlr int8": row(82.25, 80.0, 25.0)}
    rows["vitlr latency 60 %"] = {"refused": "out of reach"}
    facts = {
        "title": "ViT",
        "key": "top1",
        "floor": 40,
        "figures": {"top1": ["top-1", ".2f"]},
        "judged_on": "ten images",
    }
    return {"vit": {**facts, "clock": "time", "machine": MACHINE, "rows": rows}}


def test_every_row_that_answers_as_another_does_is_there_with_it():
    assert set(SAME) | set(SAME.values()) <= set(ROWS) and BASE in ROWS and INT8 in ROWS


def test_the_page_has_every_time_over_torch_and_over_the_rival(body):
    page = markdown(body)
    assert "| **vitlr int8** | 82.25 | 80.0 | 5.00 | 1.25 | 25.0 | 2.00 | 0.80 |" in page
    assert "vitlr latency 60 %: out of reach." in page


def test_a_model_without_accuracy_has_times_alone(body):
    body["vit"] |= {"key": "", "figures": {}}
    for found in body["vit"]["rows"].values():
        found["figures"] = {}
    assert "| **vitlr int8** | 80.0 | 5.00 | 1.25 |" in markdown(body)


def test_the_figure_names_the_model(body, tmp_path):
    pytest.importorskip("matplotlib")
    draw(body, tmp_path / "figure.svg")
    assert ">ViT, batch 8</text>" in (tmp_path / "figure.svg").read_text()


def test_a_row_that_cannot_be_says_why(monkeypatch, tmp_path):
    def refuse(subject, folder):
        raise InputError("no engine")

    monkeypatch.setitem(ROWS, "one", refuse)
    monkeypatch.setitem(ROWS, "two", lambda subject, folder: nn.Identity())
    body = {"rows": {}}
    assert list(program.opened(None, tmp_path, ["one", "two"], body)) == ["two"]
    assert body["rows"] == {"one": {"refused": "no engine"}}


def test_all_rows_take_turns_for_as_many_rounds_as_the_seconds_allow(monkeypatch):
    asked = []

    def throughput(runners, size, *, repeats, **how):
        asked.append((size, repeats))
        return {name: {"batch_ms": 250.0, "batch_ms_median": 260.0} for name in runners}

    monkeypatch.setattr(program.timing, "throughput", throughput)
    runners = {name: nn.Identity() for name in ("a", "b")}
    found = program.timed(runners, (3, 8, 8), argparse.Namespace(cpu_time=False, seconds=10))
    assert asked == [(8, 1), (8, 20), (1, 1), (1, 20)]
    assert found["a"]["8"] == {"ms": 250.0, "median": 260.0, "rounds": 20}


def test_images_are_as_many_as_are_asked_for():
    subject = argparse.Namespace(images=Noise(3))
    assert [len(batch) for batch in images(subject, 20)] == [8, 8, 4]
    assert sum(map(len, images(subject, 100))) == 24
    assert torch.equal(images(subject, 1)[0], images(subject, 9)[0][:1])
