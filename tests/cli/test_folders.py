"""Every command that takes a model takes folders and repositories by timm's names for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import Hub

import vitlr


@pytest.fixture(scope="module")
def folders(tiny_vit, tmp_path_factory):
    """The names of a compressed model and of the dense one that it came from."""
    place, dense = tmp_path_factory.mktemp("folders"), tiny_vit()
    small = vitlr.compress(dense, [torch.randn(8, 3, 32, 32)], "params:70%", rank_step=4)
    made = {"small": small, "dense": dense}
    return {name: f"local-dir:{vitlr.save_pretrained(model, place / name)}" for name, model in made.items()}


@pytest.mark.parametrize("which", ["small", "dense"])
def test_inspect_bench_and_validate(run, folders, image_folder, which):
    data = image_folder()
    assert run("inspect", folders[which]).status == 0
    found = run("bench", folders[which], "--batch-size", 2, "--repeats", 1, "--vs", folders["dense"], "--json").json
    assert found["params_vs"] >= found["params"]
    judged = run("validate", folders[which], "--data", data, "--reference", folders["dense"], "--json").json
    assert judged["images"] == 10 and (which == "small" or judged["agreement"] == 100)


def test_compress_finetune_and_frontier(run, folders, image_folder, tmp_path):
    data, out = image_folder(images=4), tmp_path / "out.safetensors"
    given = ["--data", data, "--batch-size", 8]
    assert (
        run("compress", folders["dense"], *given, "--budget", "params:80%", "--rank-step", 4, "--out", out).status == 0
    )
    assert vitlr.load(out).vitlr_info["plan"]["budget"] == "params:80%"
    once = ["--epochs", 1, "--warmup-epochs", 0, "--reference", folders["dense"], "--out", out]
    assert run("finetune", folders["small"], *given, *once).status == 0
    assert run("frontier", folders["dense"], *given, "--budgets", "params:80%", "--no-rivals").status == 0


def test_prune_and_report(run, folders, image_folder, tmp_path):
    given = ["--data", image_folder(images=4), "--batch-size", 8]
    pruned = ["--rate", 0.3, "--epochs", 1, "--finetune-epochs", 0, "--tile", 4, "--out", tmp_path / "p.safetensors"]
    assert run("prune", folders["dense"], *given, *pruned).status == 0
    pytest.importorskip("matplotlib")
    assert run("report", folders["small"], "--reference", folders["dense"], *given, "--out", tmp_path / "p").status == 0
    assert "small" in (tmp_path / "p" / "report.html").read_text()


def test_folders_that_are_none_end_with_one_line(refused, folders, image_folder, tmp_path):
    assert "there is no such folder" in refused("inspect", f"local-dir:{tmp_path / 'none'}")
    assert "is a file that knows its own model" in refused(
        "validate", folders["small"], "--data", image_folder(), "--num-classes", 3
    )


def test_the_shell_asks_the_hub_that_the_environment_names(folders, tmp_path):
    hub, folder = Hub(), Path(folders["small"].removeprefix("local-dir:"))
    hub.repositories["me/small"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    with hub.serving() as address:
        env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        shell = [sys.executable, "-m", "vitlr.cli.app", "inspect"]
        done = subprocess.run([*shell, "hf-hub:me/small"], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "low rank" in done.stdout, done.stderr
        done = subprocess.run([*shell, "hf-hub:me/large"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: hf-hub:me/large: the Hub knows no such repository")
