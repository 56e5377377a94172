"""The frontier: one calibration for all budgets, judged beside dense, kept and not measured twice."""

from __future__ import annotations

import json

import pytest
import torch

import vitlr
from vitlr.data import open_data
from vitlr.errors import InputError
from vitlr.reporting import frontier as module
from vitlr.reporting.judging import Judge
from vitlr.reporting.rows import Kept

BUDGETS = ["bytes:20%", "params:70%"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tiny_vit):
    return tiny_vit(embed_dim=64)


@pytest.fixture
def opened(image_folder, model):
    """Calibration and validation images as they are opened, which are told apart from others."""
    cal = open_data(image_folder(images=4, name="cal"), model, batch_size=8)
    return cal, open_data(image_folder(images=3, name="val"), model, batch_size=8, need_labels=True)


def test_rows_are_those_of_the_models_in_their_files(model, opened, tmp_path):
    found = vitlr.frontier(model, *opened, BUDGETS, folder=tmp_path / "out")
    assert [row.name for row in found.rows] == ["dense", *BUDGETS, module.BYTES, "plain int8", "plain int4"]
    dense, bits, ranks, *_ = found.rows
    assert dense.agreement == 100 and dense.kl == pytest.approx(0, abs=1e-9) and dense.speedup == 1
    for row in (bits, ranks):
        path = tmp_path / "out" / row.file
        small = vitlr.load(path)
        judged = vitlr.evaluate(small, opened[1], model)
        assert row.bytes == path.stat().st_size and row.top1 == judged.top1 and row.agreement == judged.agreement
        assert row.kl == pytest.approx(judged.kl) and row.ms > 0 and row.speedup > 0
        assert row.ms * row.speedup == pytest.approx(dense.ms), "the table agrees with itself"
        assert small.vitlr_info["plan"]["budget"] == row.name and small.vitlr_info["recipe"]["images"] == 20
    assert bits.bytes <= 0.5 * dense.bytes and ranks.params <= 0.7 * dense.params and ranks.macs < dense.macs
    assert bits.method in ("bits", "mix") and ranks.method == "joint" and not ranks.rounds_only
    assert all(row.ms is None for row in found.rows if row.kind == "plain")
    assert all(len(line) <= 80 for line in str(found).splitlines())
    assert "\n" not in json.dumps(found.to_dict(), allow_nan=False)


def test_what_is_there_is_not_measured_again(model, opened, tmp_path, monkeypatch):
    first = vitlr.frontier(model, *opened, BUDGETS, folder=tmp_path)
    monkeypatch.setattr(module, "calibrate", lambda *a, **k: pytest.fail("calibrated again"))
    monkeypatch.setattr(Judge, "_judged", lambda *a, **k: pytest.fail("judged again"))
    assert vitlr.frontier(model, *opened, BUDGETS, folder=tmp_path).rows == first.rows


def test_another_budget_takes_the_statistics_that_are_there(model, opened, tmp_path, monkeypatch):
    vitlr.frontier(model, *opened, BUDGETS[:1], folder=tmp_path, rivals=False)
    seen = []
    monkeypatch.setattr(Judge, "of", lambda self, small, progress=None, of=Judge.of: seen.append(1) or of(self, small))
    before = (tmp_path / "statistics.safetensors").read_bytes()
    found = vitlr.frontier(model, *opened, BUDGETS, folder=tmp_path, rivals=False)
    assert len(seen) == 1 and [row.name for row in found.rows] == ["dense", *BUDGETS]
    assert (tmp_path / "statistics.safetensors").read_bytes() == before


@pytest.mark.parametrize("changed", ["weights", "validation", "version", "file"])
def test_rows_of_something_else_are_measured_again(model, opened, tmp_path, image_folder, monkeypatch, changed):
    first = vitlr.frontier(model, *opened, BUDGETS[:1], folder=tmp_path, rivals=False)
    cal, val = opened
    if changed == "weights":
        with torch.no_grad():
            model.head.bias += 1  # no linear that was calibrated
    elif changed == "validation":
        val = open_data(image_folder(images=2, name="other"), model, batch_size=8, need_labels=True)
    elif changed == "version":
        monkeypatch.setattr(vitlr, "__version__", "another")
    else:
        (tmp_path / first.rows[1].file).unlink()
    seen = []
    monkeypatch.setattr(Judge, "of", lambda self, small, progress=None, of=Judge.of: seen.append(1) or of(self, small))
    vitlr.frontier(model, cal, val, BUDGETS[:1], folder=tmp_path, rivals=False)
    assert seen == [1]


def test_plain_lists_are_measured_every_time_since_nothing_tells_them_apart(model, batches, tmp_path):
    vitlr.frontier(model, batches, batches, BUDGETS[1:], folder=tmp_path, rivals=False)
    assert not (tmp_path / "frontier.json").exists() and list(tmp_path.glob("params_70.safetensors"))


def test_without_labels_agreement_and_kl_are_measured(model, batches):
    found = vitlr.frontier(model, batches, [images for images, _ in batches], BUDGETS[1:], rivals=False)
    assert found.rows[1].top1 is None and 0 <= found.rows[1].agreement <= 100 and found.rows[1].kl > 0
    assert found.advice.startswith("At 2 points of agreement lost")


def test_features_are_judged_by_their_cosine(tiny_vit, batches):
    model = tiny_vit(num_classes=0, embed_dim=64)
    images = [images for images, _ in batches]
    found = vitlr.frontier(model, images, images, BUDGETS[1:], rivals=False)
    with torch.no_grad():
        expected = torch.nn.functional.cosine_similarity
        assert found.rows[0].cosine == pytest.approx(1, abs=1e-6) and 0.3 < found.rows[1].cosine < 1
        assert expected(model(images[0]), model(images[0])).mean() == pytest.approx(1, abs=1e-6)
    assert "cosine" in str(found)


def test_a_budget_that_cannot_be_reached_is_told_and_the_others_are_had(model, batches):
    found = vitlr.frontier(model, batches, batches, ["params:1%", "params:70%"], rivals=False)
    assert [row.name for row in found.rows] == ["dense", "params:70%"]
    assert "cannot be reached" in found.refused["params:1%"] and "cannot be reached" in str(found)


def test_bad_input_is_refused_before_any_image(model, batches, tmp_path):
    def untouched():
        pytest.fail("read an image")
        yield

    with pytest.raises(InputError, match="cannot be read"):
        vitlr.frontier(model, untouched(), untouched(), ["params:lots"])
    with pytest.raises(InputError, match="is empty"):
        vitlr.frontier(model, untouched(), untouched(), [])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another one"):
        vitlr.frontier(model, untouched(), untouched(), folder=tmp_path / "file" / "folder")
    (tmp_path / "frontier.json").write_text('{"vitlr": "1", "rows": [{"name": 3}]}')
    with pytest.raises(InputError, match="holds no rows of a frontier"):
        vitlr.frontier(model, untouched(), untouched(), folder=tmp_path)


def test_damaged_rows_are_refused_whatever_they_hold(tmp_path):
    for text in ("", "[]", "{", '{"vitlr": "1", "rows": [[]]}', '{"vitlr": "1", "rows": {}}', "\x00"):
        (tmp_path / "frontier.json").write_text(text)
        with pytest.raises(InputError, match="remove it"):
            Kept(tmp_path)


def test_the_figure_is_text_on_no_background(model, batches, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = vitlr.frontier(model, batches, batches, BUDGETS[1:])
    found.draw(tmp_path / "one.svg")
    found.draw(tmp_path / "two.svg")
    svg = (tmp_path / "one.svg").read_text()
    assert svg == (tmp_path / "two.svg").read_text() and len(svg) < 100_000
    assert all(f">{word}</text>" in svg for word in ("MB of the file", "plain rounding", "vitlr, ranks and widths"))
    assert "#000000" not in svg and "#ffffff" not in svg  # which one of a dark and a light page would hide
    found.draw(tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_the_line_says_what_to_install(monkeypatch, tmp_path):
    from vitlr.reporting import drawing

    monkeypatch.setattr(drawing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'vitlr\[figures\]'"):
        drawing.check_drawing()
