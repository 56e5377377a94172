"""Every script of `examples/` runs: on small models, and pictures that are made on the spot."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = "test_vit"  # timm's own, of six blocks of width 64 on 160x160 pixels

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not beside the tests")


@pytest.fixture
def example(tmp_path, monkeypatch):
    """A function that gives `main` of a script, run in an empty folder on one thread."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    torch.set_num_threads(before)


def test_every_script_is_run_here():
    text = Path(__file__).read_text()
    assert all(f'example("{path.stem}")' in text for path in EXAMPLES.glob("*.py"))


def test_own_model(example, capsys):
    example("own_model")()
    shown = capsys.readouterr().out
    assert "the same logits after loading: True" in shown and re.search(r"blocks\.2\.3: \d+ -> \d+ -> 96", shown)
    assert "tokens" not in shown


def test_finetuned_vit(example, image_folder, tmp_path, capsys):
    train, val = image_folder(images=3, name="train"), image_folder(images=2, name="val")
    save_file(timm.create_model(SMALL, num_classes=5).state_dict(), tmp_path / "w.safetensors")
    example("finetuned_vit")(SMALL, tmp_path / "w.safetensors", str(train), str(val), budget="params:60%")
    shown = capsys.readouterr().out
    assert "dense: top-1" in shown and "small: top-1" in shown and "agreement" in shown
    kept, whole = re.search(r"small: ([\d.]+) of ([\d.]+) MB", shown).groups()
    assert float(kept) < 0.75 * float(whole)
    assert "| agreement" not in (tmp_path / "small" / "README.md").read_text()
    assert "same first class as dense" in (tmp_path / "small" / "README.md").read_text()


def test_dinov2_knn(example, image_folder, capsys):
    train, val = image_folder(images=3, name="train"), image_folder(images=2, name="val")
    example("dinov2_knn")(SMALL, str(train), str(val), budget="params:70%", pretrained=False)
    shown = capsys.readouterr().out
    assert re.search(r"dense: [\d.]+ % of 10 images", shown) and re.search(r"small: [\d.]+ % of 10 images", shown)
    assert 0.5 < float(re.search(r"features: ([\d.]+)", shown)[1]) <= 1


def test_backbone(example, image_folder, capsys):
    example("backbone")(SMALL, str(image_folder()), pretrained=False)
    cosines = re.findall(r"block (\d): \[8, 64, 10, 10\], cosine ([\d.]+)", capsys.readouterr().out)
    assert [block for block, _ in cosines] == ["2", "5"] and all(float(cosine) > 0.3 for _, cosine in cosines)


def test_clip_image_tower(example, image_folder, tmp_path, capsys):
    save_file({"text": torch.randn(7, 1000)}, tmp_path / "text.safetensors")
    example("clip_image_tower")(
        SMALL, str(image_folder()), tmp_path / "text.safetensors", budget="params:80%", pretrained=False
    )
    assert re.search(r"tower\.safetensors: [\d.]+ MB\nagreement [\d.]+ %", capsys.readouterr().out)


def test_transformers_vit(example, image_folder, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8, num_labels=5)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    example("transformers_vit")(str(tmp_path / "model"), str(image_folder()))
    assert re.search(r"agreement [\d.]+ %", capsys.readouterr().out)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit")
    assert again.config.intermediate_size == 64
