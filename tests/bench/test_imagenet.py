"""The command for a machine with ImageNet, from end to end on a tiny model and a few images."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vitlr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
imagenet = importlib.import_module("bench.trained.imagenet")

TINY = ["img_size=32", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2", "num_classes=4"]


@pytest.fixture
def command(tmp_path) -> list[str]:
    """A trained-looking model and coloured images of four classes, whose names are not in the model's order."""
    generator = torch.Generator().manual_seed(0)
    names = ["d", "b", "a", "c"]
    for split, each in (("train", 12), ("val", 3)):
        for name in names:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = torch.randint(0, 256, (5, 5, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).resize((40, 36)).save(folder / f"{i}.png")
    (tmp_path / "classes.txt").write_text("\n".join(names))
    torch.manual_seed(0)
    model = vitlr.create_model("deit_base_patch16_224", **dict(map(imagenet._value, TINY)))
    for p in model.parameters():
        p.data += torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    flags = ["--train", tmp_path / "train", "--val", tmp_path / "val", "--class-map", tmp_path / "classes.txt"]
    flags += ["--checkpoint", tmp_path / "weights.safetensors", "--work", tmp_path / "work", "--out", tmp_path]
    flags += ["--budgets", "params:60%", "--refine", "refit", "only-distil", "--rank-step", "1", "--images", "40"]
    flags += ["--workers", "0", "--batch-size", "10", "--device", "cpu", "--threads", "1", "--model-kwargs", *TINY]
    return [*map(str, flags), "--recipe", "steps=12", "every=4", "batch_size=8", "lr=0.001", "proxy_images=16"]


def test_one_command_gives_the_table_and_goes_on_where_it_stopped(command, tmp_path, monkeypatch):
    imagenet.main(command)
    body = json.loads((tmp_path / "imagenet_deit_base_patch16_224.json").read_text())
    assert [row["name"] for row in body["rows"]] == ["dense", "params-60", "params-60-refit", "params-60-only-distil"]
    dense, bare, refitted, trained = body["rows"]
    assert dense["images"] == 12 and dense["kl"] is None
    assert bare["params"] <= 0.6 * dense["params"] and bare["rungs"] == []
    assert [rung["name"] for rung in refitted["rungs"]] == ["refit"]
    assert [rung["name"] for rung in trained["rungs"]] == ["distil"] and trained["steps"] == 12
    assert {rung["images"] for rung in trained["rungs"]} == {32}, "40 images, 8 of them held out"
    table = (tmp_path / "imagenet_deit_base_patch16_224.md").read_text()
    assert "2402.06004" in table and table.count("params:60%") == 3

    work = next((tmp_path / "work").iterdir())
    (work / "params-60-only-distil.json").unlink()
    for expensive in ("calibrate", "refine"):
        monkeypatch.setattr(imagenet, expensive, lambda *a, **k: pytest.fail("done before"))
    imagenet.main(command)
    again = json.loads((tmp_path / "imagenet_deit_base_patch16_224.json").read_text())
    assert [{**row, "seconds": 0} for row in again["rows"]] == [{**row, "seconds": 0} for row in body["rows"]]


def test_what_is_missing_is_said_before_any_work(command, tmp_path):
    command[command.index("--val") + 1] = str(tmp_path / "nowhere")
    with pytest.raises(vitlr.InputError, match="nowhere"):
        imagenet.main(command)
    assert not (tmp_path / "work").exists()
