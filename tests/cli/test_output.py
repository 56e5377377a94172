"""What the command line prints where, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from commandline import KEYS, NAME, TINY, nothing_left
from safetensors.torch import load_file

import vitlr
from vitlr.calibration.statistics import Statistics


def test_help_names_every_command_and_version(run):
    answer = run("--help")
    assert answer.status == 0
    for command in ("inspect", "compress", "prune", "validate", "export", "bench", "doctor", "demo"):
        assert f"\n  {command} " in answer.out
    assert run("--version").out == f"vitlr {vitlr.__version__}\n"


@pytest.mark.parametrize("args", [[], ["nonsense"], ["compress", NAME], ["compress", NAME, "--rank-step", "0"]])
def test_bad_usage_is_status_2(run, args):
    assert run(*args).status == 2


def test_cli_needs_no_timm_to_start():
    slow = ("torch", "timm", "torchvision", "rich", "matplotlib")
    code = f"import sys, vitlr.cli; print([m for m in {slow} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_inspect(run):
    values = run("inspect", NAME, *TINY, "--json").json
    assert values["layers"] == 8 and [row["name"] for row in values["kept"]] == ["head"]
    assert values["share"] == pytest.approx(sum(row["params"] for row in values["targets"]) / values["params"])
    text = run("inspect", NAME, *TINY).out
    assert "blocks.1.mlp.fc2" in text and "the classifier" in text and f"{values['params']:,} parameters" in text


def test_inspect_sums_up_what_is_alike_in_a_deep_model(run):
    deep = [value if value != "depth=2" else "depth=7" for value in TINY]
    values, text = run("inspect", NAME, *deep, "--json").json, run("inspect", NAME, *deep).out
    assert values["layers"] == 28 and "blocks.{0-6}.mlp.fc2" in text and "blocks.0.mlp.fc2" not in text
    assert len(text.splitlines()) < 12 and all(len(line) <= 80 for line in text.splitlines())
    share = sum(row["params"] for row in values["targets"] if row["name"].endswith("fc2"))
    assert f"{share / 1e6:.3f}M" in next(line for line in text.splitlines() if "mlp.fc2" in line)


def test_inspect_shows_layers_in_the_order_of_the_model(run, squeeze, tmp_path):
    run(*squeeze(method="lowrank"))
    lines = run("inspect", tmp_path / "small.safetensors").out.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("blocks.")]
    assert names == [f"blocks.{i}.{kind}" for i in (0, 1) for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def test_inspect_shows_bypassed_layers(run):
    small = ["--img-size", "32", "--model-kwargs", "embed_dim=32", "depth=1", "num_heads=2"]
    values = run("inspect", "beit_base_patch16_224", *small, "--json").json
    notes = {row["name"]: row["reason"] for row in values["targets"]}
    assert "made visible" in notes["blocks.0.attn.qkv"] and notes["blocks.0.attn.proj"] == ""


def test_compress_writes_a_file_that_the_other_commands_read(run, squeeze, tmp_path, weights, tiny_vit):
    out, data = tmp_path / "small.safetensors", tmp_path / "folder"
    answer = run(*squeeze("--json"))
    values = answer.json
    assert list(values) == KEYS and values["out"] == str(out) and values["rungs"] == [] and values["images"] == 20
    assert values["bytes"] == out.stat().st_size
    small = vitlr.load(out)
    assert sum(p.numel() for p in small.parameters()) == values["params_kept"] <= 0.7 * values["params"]
    assert values["params"] == sum(p.numel() for p in tiny_vit().parameters())
    assert values["macs_kept"] < values["macs"]
    assert small.vitlr_info["recipe"]["data"] == "folder" and str(tmp_path) not in json.dumps(small.vitlr_info)

    checked = run("validate", out, "--data", data, "--json").json
    assert list(checked) == ["top1", "top5", "agreement", "kl", "images", "skipped", "top1_low", "top1_high"]
    assert checked["agreement"] is None and checked["images"] == 20 and checked["top1_low"] <= checked["top1"]
    # One --checkpoint is for the one model that needs it; the two directions agree in who agrees with whom.
    there = run("validate", out, "--data", data, "--reference", NAME, "--checkpoint", weights, *TINY, "--json").json
    back = run("validate", NAME, "--data", data, "--reference", out, "--checkpoint", weights, *TINY, "--json").json
    assert there["top1"] == checked["top1"] and there["kl"] > 0 and there["agreement"] == back["agreement"]
    assert (
        f"{there['kl']:.4f} nats"
        in run("validate", out, "--data", data, "--reference", NAME, "--checkpoint", weights, *TINY).out
    )

    low_rank = run("inspect", out, "--json").json["low_rank"]
    assert {row["name"]: row["rank"] for row in low_rank} == {
        name: module.rank for name, module in small.named_modules() if isinstance(module, vitlr.LowRankLinear)
    }


@pytest.mark.parametrize("method", ["lowrank", "joint", "widths"])
def test_bench_compares_with_the_model_it_came_from_and_with_another(run, squeeze, tmp_path, method):
    run(*squeeze(method=method))
    out = tmp_path / "small.safetensors"
    values = run("bench", out, "-b", "1,2", "--repeats", "2", "--json").json
    assert values["vs"] == NAME and values["params"] < values["params_vs"] and values["macs"] < values["macs_vs"]
    assert [row["batch_size"] for row in values["results"]] == [1, 2]
    for row in values["results"]:
        assert row["speedup"] == pytest.approx(row["batch_ms_vs"] / row["batch_ms"])
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch_size"] / row["batch_ms"])
        assert row["kernel_speedup"] == pytest.approx(row["batch_ms_plain"] / row["batch_ms_fused"])
    original = run("bench", NAME, "-b", "1", "--repeats", "1", *TINY, "--json").json
    assert all(values[f"{key}_vs"] == original[key] for key in ("params", "macs", "bytes"))
    text = run("bench", out, "-b", "1", "--repeats", "1").out
    assert f"of {NAME}'s" in text
    assert "kernels for " in text and "plain ms" in text
    text = run("bench", out, "-b", "1", "--repeats", "1", "--no-kernels").out
    assert "kernels" not in text
    text = run("bench", out, "-b", "2", "--repeats", "1", "--vs", NAME, "--precision", "bfloat16", *TINY).out
    assert "bfloat16" in text and f"vs     {NAME}" in text
    assert original["vs"] is None and not original["results"][0].keys() & {"speedup", "kernel_speedup"}


def test_plan_only_writes_nothing_but_the_plan_asked_for(run, squeeze, tmp_path):
    answer = run(*squeeze("--plan-only", out=None))
    assert answer.status == 0 and "blocks.0.mlp.fc1" in answer.out and "kept)" in answer.out
    values = run(*squeeze("--plan-only", "--json", plan_out=tmp_path / "plan.json")).json
    assert list(values) == KEYS and values["out"] is None
    assert vitlr.Plan.load(tmp_path / "plan.json").params_kept == values["params_kept"]
    assert nothing_left(tmp_path, "small.safetensors")


def test_plan_options_reach_the_plan(run, squeeze, tmp_path):
    stats, path = tmp_path / "stats.safetensors", tmp_path / "plan.json"

    def plan(*flags, **options):
        answer = run(*squeeze("--plan-only", *flags, stats=stats, plan_out=path, **options))
        assert answer.status == 0, answer.err
        return vitlr.Plan.load(path)

    first = plan()
    assert all(rank % 4 == 0 for rank in first.ranks.values())
    assert {row.reason for row in plan("--uniform").layers if row.rank is not None} == {"uniform share"}
    assert all(rank >= 8 for rank in plan(min_rank=8).ranks.values())
    assert set(plan(include="mlp", exclude="fc2", budget="params:90%").ranks) <= {f"blocks.{i}.mlp.fc1" for i in (0, 1)}
    assert plan("--centred", objective="output").centred and plan(objective="output").objective == "output"
    assert plan(budget="macs:80%").macs_kept <= 0.8 * first.macs


def test_statistics_are_reused_without_the_images(run, squeeze, tmp_path):
    stats, out = tmp_path / "stats.safetensors", tmp_path / "small.safetensors"
    assert run(*squeeze(stats=stats)).status == 0
    written, model = stats.read_bytes(), out.read_bytes()
    notes = Statistics.load(stats).notes
    assert notes.pop("listing")  # of the files
    assert notes == {
        "complete": True, "images_total": 20, "files_done": 20, "skipped": 0, "data": "folder"
    }  # fmt: skip
    answer = run(*squeeze(stats=stats, data=None))
    assert answer.status == 0 and "calibrating" not in answer.err
    assert out.read_bytes() == model and stats.read_bytes() == written


def test_one_corrupt_image_is_skipped_counted_and_reported(run, squeeze, tmp_path, image_folder):
    data = image_folder(name="holed", images=4)
    (data / "c" / "1.jpg").write_bytes(b"no image")
    stats = tmp_path / "stats.safetensors"
    answer = run(*squeeze("--json", data=data, stats=stats))
    assert answer.json["images"] == 19 and Statistics.load(stats).notes["skipped"] == 1
    assert "warning: skipped 1 of 20 images" in answer.err and "c/1.jpg" in answer.err.replace(os.sep, "/")
    checked = run("validate", tmp_path / "small.safetensors", "--data", data, "--json")
    assert checked.json["skipped"] == 1 and checked.json["images"] == 19


def test_images_without_classes_are_compared_with_a_reference(run, refused, squeeze, weights, tmp_path, jpeg):
    run(*squeeze())
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(6):
        (flat / f"{i}.jpg").write_bytes(jpeg(i))
    small = tmp_path / "small.safetensors"
    assert "has no classes" in refused("validate", small, "--data", flat)
    given = ["--reference", NAME, "--reference-checkpoint", weights, *TINY]
    values = run("validate", small, "--data", flat, *given, "--json").json
    assert values["top1"] is None and values["images"] == 6 and 0 <= values["agreement"] <= 100
    text = run("validate", small, "--data", flat, *given).out
    assert "agreement" in text and "top-1" not in text and "images as 3x32x32" in text
    text = run("validate", small, "--data", flat, *given, "--mean", "0.1,0.2,0.3", "--std", "0.4").out
    assert "mean 0.1, 0.2, 0.3, std 0.4, 0.4, 0.4" in text


def test_inspect_tells_the_stages_of_a_hierarchy_apart_in_eighty_columns(run):
    small = ["--num-classes", "5", "--model-kwargs", "dims=(8,16,24,32)", "depths=(1,1,1,1)"]
    lines = run("inspect", "convnext_atto", *small).out.splitlines()
    opened = [line.split()[0] for line in lines if line.endswith("opened")]
    assert len(opened) == len(set(opened)) == 8 and max(map(len, lines)) <= 80


def test_refine_validate_and_bench_fit_eighty_columns(run, squeeze, image_folder, weights, tmp_path):
    data, file = image_folder(images=8, name="forty"), tmp_path / "small.safetensors"
    said = run(*squeeze(data=data, refine="distil", steps=6)).out
    given = ["--reference", NAME, "--reference-checkpoint", weights, *TINY]
    said += run("validate", file, "--data", data, *given).out
    said += run("bench", file, "--batch-size", "1,8", "--repeats", 1).out
    said = said.replace(str(file), "small.safetensors")  # where a test's files lie takes a line of its own
    assert max(map(len, said.splitlines())) <= 80 and "vs ms" in said and "fused ms" in said and "agreement" in said


def test_a_key_is_for_the_weight_file_that_needs_it(run, refused, tiny_vit, image_folder, tmp_path, weights):
    both, data = tmp_path / "both.pth", image_folder(images=1)
    torch.save({"student": tiny_vit(seed=8).state_dict(), "teacher": load_file(weights)}, both)
    check = ["validate", NAME, "--data", data, *TINY]
    key = ["--checkpoint-key", "teacher", "--json"]
    plain = ["--reference", NAME, "--reference-checkpoint", weights]
    assert "say which with --checkpoint-key" in refused(*check, "--checkpoint", both)
    assert run(*check, "--checkpoint", both, *plain, *key).json["kl"] < 1e-6
    assert "say which" in refused(*check, "--checkpoint", weights, *plain[:3], both)
    assert "goes with --checkpoint" in refused("inspect", NAME, *TINY, "--checkpoint-key", "teacher")
