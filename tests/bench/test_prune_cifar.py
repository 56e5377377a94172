"""The experiment of bench/trained/prune_cifar.py on a handful of images, and the arithmetic of its table."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

BENCH = Path(__file__).resolve().parents[2] / "bench"
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="bench/ is not beside the tests")


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """The script on 256 training and 20 test images, a ViT of two blocks and one epoch from nothing."""
    monkeypatch.syspath_prepend(str(BENCH.parent))
    from bench.trained import cifar, prune_cifar
    from vitlr.training import TrainRecipe

    draw = torch.Generator().manual_seed(0)
    with tarfile.open(tmp_path / "cifar10_jpeg.tar.xz", "w:xz") as tar:
        for split, count in (("train", 26), ("test", 2)):
            for label in range(10):
                for i in range(count):
                    file = io.BytesIO()
                    pixels = torch.randint(0, 256, (32, 32, 3), generator=draw, dtype=torch.uint8).numpy()
                    Image.fromarray(pixels).save(file, "JPEG")
                    member = tarfile.TarInfo(f"{split}/class{label}/{i:04d}.jpg")
                    member.size = file.tell()
                    file.seek(0)
                    tar.addfile(member, file)
    monkeypatch.setattr(cifar, "BUILD", tmp_path / "build")
    monkeypatch.setattr(cifar, "DEPTH", 2)
    for name in ("CACHE", "RESULTS", "TABLE"):
        monkeypatch.setattr(prune_cifar, name, tmp_path / name.lower())
    monkeypatch.setattr(prune_cifar, "REPEATS", 2)
    monkeypatch.setattr(prune_cifar, "FROM_NOTHING", TrainRecipe(epochs=1, lr=1e-3, keep="last"))
    return prune_cifar, tmp_path


def test_every_arm_makes_a_row_once(experiment, capsys):
    script, folder = experiment
    args = argparse.Namespace(
        threads=1,
        data=folder,
        arms=[*script.WHOLE, *ARMS],
        fewer=[44.0],
        seeds=[0],
        speed=None,
        report=False,
        note=["A note."],
    )
    script.main(args)
    rows = {
        row["arm"]: row
        for row in map(json.loads, (line for line in capsys.readouterr().out.splitlines() if line[:1] == "{"))
    }
    assert set(rows) == {*script.WHOLE, *ARMS}
    dense = rows["dense"]
    for arm in ARMS:
        assert 0.5 * dense["params"] < rows[arm]["params"] <= 0.56 * dense["params"]
        assert rows[arm]["macs"] < 0.7 * dense["macs"] and rows[arm]["epochs"] == dense["epochs"] == 3
    assert rows["narrow"]["fewer"] is None and rows["narrow"]["params"] < 0.6 * dense["params"]
    kept = {path: path.stat().st_mtime_ns for path in (folder / "cache").glob("*.json")}
    args.speed = 44.0
    script.main(args)
    args.speed, args.report = None, True
    script.main(args)
    args.report = False
    script.main(args)
    assert kept == {path: path.stat().st_mtime_ns for path in (folder / "cache").glob("*.json")}
    text = (folder / "table").read_text()
    assert (
        text.count("hybrid as published") == 2 and text.count("x |") >= 3 and "A note." in text
    )  # in the table, and among the speeds
    assert len(json.loads((folder / "results").read_text())["rows"]) == len(rows)


ARMS = ("vtp", "low_rank", "hybrid", "joint")


def test_relative_errors_and_their_interval(experiment):
    from bench.trained.tables import interval, relative_errors

    dense = {0: {"after": {"error": 20.0}}, 1: {"after": {"error": 25.0}}}
    rows = [{"seed": 0, "after": {"error": 22.0}}, {"seed": 1, "after": {"error": 25.0}}]
    assert relative_errors(rows, dense) == pytest.approx([10, 0])
    low, high = interval([10.0, 0.0])
    assert (low, high) == pytest.approx(
        (5 - 12.706 * 5, 5 + 12.706 * 5)
    )  # t with one degree of freedom, s / sqrt(2) = 5
    assert interval([3.0]) is None
