"""`vitlr frontier`: a table and an advice from one calibration, what is kept, and what is refused first."""

from __future__ import annotations

import sys

import pytest
from commandline import NAME, TINY

from vitlr.cli.commands.frontier import read_budgets
from vitlr.errors import InputError


@pytest.fixture
def ask(weights, image_folder, tmp_path):
    """The arguments of a small `frontier`; keywords replace or add options, None takes one out."""
    usual = {"checkpoint": weights, "data": image_folder(images=4), "budgets": "bytes:25%,params:80%", "batch-size": 8}
    usual |= {"out": tmp_path / "out", "workers": 0}

    def make(*flags, **options):
        options = {**usual, **{key.replace("_", "-"): value for key, value in options.items()}}
        given = [text for key, value in options.items() if value is not None for text in (f"--{key}", value)]
        return ["frontier", NAME, *given, *flags, *TINY]

    return make


def test_rows_advice_models_and_figure_come_from_one_run_and_stay(run, ask, tmp_path, image_folder):
    val = image_folder(name="val", images=3)
    values = run(*ask("--json", val=val)).json
    names = [row["name"] for row in values["rows"]]
    assert names[:3] == ["dense", "bytes:25%", "params:80%"] and {"plain int8", "plain int4"} < set(names)
    assert all(row["images"] == 15 and row["top1"] is not None for row in values["rows"])
    assert values["advice"].startswith("At 0.5 points of top-1 lost") and values["refused"] == {}
    assert (tmp_path / "out" / values["rows"][1]["file"]).stat().st_size == values["rows"][1]["bytes"]
    again = run(*ask("--lose", "100", val=val))
    assert "calibrating" not in again.err and "At 100 points of top-1 lost the smallest is" in again.out
    assert all(len(line) <= 80 for line in again.out.splitlines() if str(tmp_path) not in line)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert (tmp_path / "out" / "frontier.svg").is_file() and (tmp_path / "out" / "frontier.png").is_file()


def test_without_other_images_a_fifth_is_held_out(run, ask):
    values = run(*ask("--json", "--no-rivals", budgets="params:80%", out=None)).json
    assert [(row["name"], row["images"]) for row in values["rows"]] == [("dense", 4), ("params:80%", 4)]
    assert values["out"] is None and values["figure"] is None


def test_without_matplotlib_the_table_is_there_and_says_what_is_missing(run, ask, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("vitlr.reporting.drawing.can_draw", lambda: False)
    answer = run(*ask("--no-rivals", budgets="params:80%"))
    assert answer.status == 0 and "pip install 'vitlr[figures]'" in answer.out and "params:80%" in answer.out


def test_what_can_be_refused_first_is(refused, ask, tmp_path, unread):
    assert "'bytes:lots' cannot be read" in refused(*ask(budgets="bytes:lots"))
    assert "the first names a quantity" in refused(*ask(budgets="50%,25%"))
    assert "bytes:25% twice" in refused(*ask(budgets="bytes:25%,25%"))
    assert "--data is missing" in refused(*ask(data=None))
    (tmp_path / "file").write_text("")
    assert "is a file, expected a folder" in refused(*ask(out=tmp_path / "file"))


def test_a_share_goes_on_with_the_quantity_before_it():
    assert read_budgets("bytes:50%, 25%,macs:1.5G,params:60%,50%") == [
        "bytes:50%", "bytes:25%", "macs:1500000000", "params:60%", "params:50%"
    ]  # fmt: skip
    with pytest.raises(InputError, match="cannot be read"):
        read_budgets("")
    with pytest.raises(InputError, match="latency:50% is measured, and one of many is not: give it to vitlr compress"):
        read_budgets("bytes:50%,latency:50%")
