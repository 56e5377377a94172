"""The demo: quick, it must learn, shrink as asked, reload what it saved, and leave nothing behind."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vitlr.checkpoint import files
from vitlr.checkpoint.creation import create_model
from vitlr.cli.app import app
from vitlr.cli.commands import demo
from vitlr.data import open_data
from vitlr.errors import InputError

README = Path(__file__).parents[2] / "README.md"
pytest.importorskip("sklearn", reason="the demo's digits come with scikit-learn")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[dict, str]:
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    before = torch.get_rng_state(), torch.get_num_threads()
    result = demo.run(quick=True, out=folder, json=True)
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]
    return result, str(folder)


def test_figures_are_those_of_a_model_that_learned_and_shrank(finished):
    rows = finished[0]["rows"]
    assert [row["model"] for row in rows] == ["dense", *demo.QUICK.budgets]
    dense, half, quarter = rows
    assert dense["images"] == finished[0]["test_images"] == 450
    assert dense["top1"] > 85 and dense["agreement"] == 100 and dense["speedup"] == {"64": 1.0}
    assert half["top1"] > 75 and half["top1_low"] < half["top1"] < half["top1_high"]
    assert half["params"] <= 0.50 * dense["params"] and quarter["params"] <= 0.25 * dense["params"]
    assert quarter["macs"] < half["macs"] < dense["macs"] and quarter["bytes"] < half["bytes"] < dense["bytes"]


def test_result_is_one_line_of_json(finished):
    assert "\n" not in json.dumps(finished[0], allow_nan=False)


def test_files_are_kept_and_hold_the_models(finished):
    result, folder = finished
    assert result["out"] == folder
    digits = demo.load_digits()
    small = files.load(f"{folder}/params_25.safetensors")
    right = (small(digits.test).argmax(1) == digits.test_labels).double().mean()
    assert 100 * float(right) == pytest.approx(result["rows"][2]["top1"])
    assert small.vitlr_info["plan"]["budget"] == "params:25%"


def test_table_shows_every_row_uncut(finished, capsys):
    demo._show(finished[0], demo.QUICK)
    shown = capsys.readouterr()
    assert "…" not in shown.out and not shown.err
    assert all(len(line) <= 80 for line in shown.out.splitlines() if str(finished[1]) not in line)
    for row in finished[0]["rows"]:
        line = next(line for line in shown.out.splitlines() if row["model"] in line)
        assert f"{row['top1']:.2f}" in line and f"{row['macs'] / 1e6:.1f}" in line


def test_test_images_are_not_trained_on():
    digits = demo.load_digits()
    assert len(digits.train) + len(digits.test) == 1797
    assert torch.equal(digits.test, demo.load_digits().test)
    seen = {image.numpy().tobytes() for image in digits.train}
    assert not any(image.numpy().tobytes() in seen for image in digits.test)
    assert digits.test_labels.bincount().min() >= 40


def test_missing_scikit_learn_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'vitlr\[demo\]'"):
        demo.run(quick=True)


def test_unwritable_folder_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo, "train", lambda *a, **k: pytest.fail("it trained first"))
    with pytest.raises(InputError, match="choose another --out"):
        demo.run(quick=True, out=tmp_path / "file" / "folder")


def test_a_reloaded_model_that_differs_is_an_error(tmp_path):
    model = torch.nn.Linear(4, 2)
    with pytest.raises(Exception, match="other logits"):
        demo._check_identical(model, torch.nn.Linear(4, 2), torch.ones(1, 4), tmp_path / "f.safetensors")


def test_the_images_it_keeps_are_those_it_was_trained_on(tmp_path):
    digits = demo.load_digits()
    demo.write_images(digits.train[:40], digits.train_labels[:40], tmp_path)
    model = create_model(demo.QUICK.name, **demo.QUICK.args)
    found = torch.cat([images for images, _ in open_data(tmp_path, model)])
    assert found.shape == (40, *demo.SHAPE)
    apart = (found[:, None] - digits.train[:40]).abs().amax((2, 3, 4))
    assert (apart.amin(1) <= 1 / 255 + 1e-6).all()  # half a step of a byte
    assert sorted(apart.argmin(1).tolist()) == list(range(40))


def test_what_the_readme_does_with_its_files_can_be_pasted(finished, tmp_path, monkeypatch):
    lines = re.search(r"^vitlr demo --quick --out demo\n((?:vitlr .*\n)+)", README.read_text(), re.MULTILINE)
    assert lines is not None
    (tmp_path / "demo").symlink_to(finished[1])
    monkeypatch.chdir(tmp_path)
    for line in lines[1].splitlines():
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}: {result.output}{result.exception!r}"
    assert (tmp_path / "demo" / "frontier" / "frontier.svg").is_file()
    assert (tmp_path / "demo" / "page" / "report.html").is_file()
