"""The frontier: rows are measured once, plain rounding is what it says, table and figure hold what they are given."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
frontier = pytest.importorskip("bench.compare.frontier.__main__", reason="bench/ is not beside the tests")
from bench.compare.frontier import borrowed, figure, page, rivals, subjects  # noqa: E402


def row(name: str, size: float, top1: float) -> dict:
    shares = {"top1": top1, "top1_low": top1 - 2, "top1_high": top1 + 2}
    facts = {"processor": "some processor", "torch": "2", "date": "2026-01-01"}
    return {"name": name, "bytes": round(size * 1e6), **shares, "kl": 0.1, "machine": facts, "tools": {"nncf": "3"}}


@pytest.fixture
def body() -> dict:
    rows = [row("dense, float32", 20, 80), row("NNCF int4", 3.5, 78), row("NNCF int2", 2, 1)]
    rows += [row("vitlr bits, 3.4 MB", 3.4, 79), row("vitlr bits, 3 MB", 3, 79.5), row("vitlr bits, 5 MB", 5, 80)]
    figures = {"top1": ["top-1", ".2f"], "kl": ["KL", ".4f"]}
    facts = {"title": "A model", "key": "top1", "floor": 40, "figures": figures, "calibration_images": 10}
    return {"a": {**facts, "judged_on": "some images", "rows": rows}}


def test_a_rival_stands_beside_the_best_of_ours_that_is_no_larger(body):
    lines = {line.split(" | ")[0].strip("|* "): line for line in page.markdown(body).splitlines()}
    assert lines["NNCF int4"] == "| NNCF int4 | 3.500 | 78.00 (76.0 to 80.0) | 0.1000 | 79.50 |"
    assert lines["NNCF int2"].endswith("| 0.1000 |  |")  # none of ours is so small
    assert lines["vitlr bits, 3.4 MB"].endswith("| 0.1000 |  |")


def test_the_figure_is_text_and_lines_on_no_background(body, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure.draw(body, tmp_path / "one.svg")
    svg = (tmp_path / "one.svg").read_text()
    assert all(f">{word}</text>" in svg for word in ("A model", "NNCF", "vitlr bits", "top-1", "dense, 20.0 MB"))
    assert "font-face" not in svg and "base64" not in svg and len(svg) < 100_000
    assert "#000000" not in svg and "#ffffff" not in svg  # which one of a dark and a light page would hide
    figure.draw(body, tmp_path / "two.svg")
    assert (tmp_path / "two.svg").read_text() == svg


def test_a_row_that_is_there_is_not_measured_again(tmp_path):
    made = []

    def make(subject, folder):
        made.append(folder)
        return torch.nn.Identity(), 5, {"more": 1}

    class Fixed(subjects.Subject):
        name, title, key, floor = "a", "A", "top1", 0.0
        figures = {"top1": ("top-1", ".1f")}  # noqa: RUF012
        says = {"judged_on": "nothing"}  # noqa: RUF012

        def measured(self, forward):
            return {"top1": 50.0 + len(made)}

    subject = Fixed(torch.nn.Identity(), SimpleNamespace(images=3))
    for again in (False, False, True):
        frontier.measure(subject, {"one": make}, tmp_path, SimpleNamespace(out=tmp_path, again=again))
    found = frontier.read(tmp_path / "frontier.json")["a"]
    assert len(made) == 2 and found["calibration_images"] == 3
    assert [(r["name"], r["bytes"], r["top1"], r["more"]) for r in found["rows"]] == [("one", 5, 52.0, 1)]


def test_codes_of_four_bits_go_in_pairs():
    codes = torch.tensor([[-8, 7, -1, 0]], dtype=torch.int8)
    assert rivals.pairs(codes).tolist() == [8 | 7 << 4, 15 | 0 << 4]


def test_neighbours_vote_by_their_cosines(monkeypatch):
    monkeypatch.setattr(subjects, "NEIGHBOURS", 3)
    bank = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0.1, 1], [0.2, 1], [-1, 0]]))
    labels = torch.tensor([0, 1, 1, 2])
    asked = torch.nn.functional.normalize(torch.tensor([[1.0, 0.05], [0, 1]]))
    assert subjects.neighbours(bank, labels, asked).tolist() == [0, 1]


def test_rows_of_the_table_of_bits_are_taken_over_by_family_and_size():
    figures = dict.fromkeys(borrowed.FIGURES, 50.0)
    rows = [
        {"method": "nearest, 4 bits, groups of 64", **figures},
        {"method": '**vitlr, `method="bits"`**', **figures, "bytes": 2_296_000},
        {"method": '**vitlr, `method="bits"`, refined**', **figures, "bytes": 1_798_000, "code": "new"},
    ]
    found = borrowed.borrowed({"rows": rows, "code": "old", "machine": {}})
    assert [(r["name"], r["code"]) for r in found] == [
        ("nearest, 4 bits, groups of 64", "old"),
        ("vitlr bits, 2.3 MB", "old"),
        ("vitlr refined, 1.8 MB", "new"),
    ]
    was = [{"name": "vitlr bits, 2.3 MB", "top1": 1}, {"name": "NNCF", "top1": 2}]
    assert borrowed.merged(was, found) == [was[1], *found]
