"""`vitlr compress --method`: what it measures, writes and refuses."""

from __future__ import annotations

import json
import re

import pytest

import vitlr
from vitlr import compression
from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint.structure import structure

STEPS = ("--width-step", "8", "--rank-step", "4")


@pytest.mark.parametrize("method", ["widths", "widths+ranks", "joint"])
def test_a_narrower_model_is_written_and_read(run, squeeze, tmp_path, method):
    answer = run(*squeeze("--method", method, *STEPS, "--json"))
    small = vitlr.load(tmp_path / "small.safetensors")
    assert sum(p.numel() for p in small.parameters()) == answer.json["params_kept"]
    assert any("width" in entry for entry in structure(small).values())
    assert small.vitlr_info["plan"]["method"] == small.vitlr_info["recipe"]["method"] == method
    rows = run("inspect", tmp_path / "small.safetensors", "--json").json["narrowed"]
    assert rows and all(row["width"] <= row["full_width"] == 128 for row in rows)
    seen = run("inspect", tmp_path / "small.safetensors").out
    assert re.search(r"^blocks\.\d\.mlp +narrowed +\d+ of 128 +hidden width kept$", seen, re.MULTILINE)
    assert max(map(len, seen.splitlines()[:-6])) <= 80  # below, the name is the file's path


def test_statistics_without_hidden_moments_are_refused_and_those_with_serve_all(run, refused, squeeze, tmp_path):
    stats, plan = tmp_path / "s.safetensors", tmp_path / "plan.json"
    run(*squeeze("--stats", stats, "--method", "lowrank", "--plan-only"))
    assert Statistics.load(stats).extras == ()
    assert "hold no moments of hidden neurons" in refused(*squeeze("--stats", stats, "--method", "joint"))
    stats.unlink()
    run(*squeeze("--stats", stats, "--method", "widths+ranks", "--prune-rate", "0.4", *STEPS, "--plan-out", plan))
    body = json.loads(plan.read_text())
    assert body["method"] == "widths+ranks" and sum(row["width"] for row in body["widths"]) <= 0.6 * 256
    assert run(*squeeze("--stats", stats)).status == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--method", "magic"), "unknown --method 'magic'"),
        (("--method", "widths+ranks", "--prune-rate", "1.5"), "between 0 and 1"),
        (("--method", "joint", "--prune-rate", "0.5"), "goes with --method 'widths' or 'widths+ranks'"),
        (("--method", "joint", "--objective", "normalized"), "hidden moments are of tokens"),
        (("--method", "joint", "--prune-attention", "all"), "expected one of query_keys, channels, heads, none"),
        (
            ("--method", "widths+ranks", "--prune-attention", "heads"),
            "goes with a budget and --method 'widths' or 'joint'",
        ),
        (("--rounds", "2", "--method", "lowrank"), "does not go with --method 'lowrank'"),
        (("--method", "joint", "--rounds", "9"), "--rounds 9, expected a whole number from 1 to 8"),
        (("--method", "bits"), "--method 'bits' changes bytes only"),
        (("--prune-rate", "0.5"), "goes with --method 'widths' or 'widths+ranks'"),
        (("--method", "joint", "--uniform"), "--uniform goes with --method 'lowrank' only"),
    ],
)
def test_bad_choices_are_refused_before_an_image_is_read(refused, squeeze, flags, said):
    assert said in refused(*squeeze(*flags))


def test_weights_are_rounded_written_and_read(run, squeeze, tmp_path):
    answer = run(*squeeze("--method", "bits", "--json", budget="bytes:20%"))
    path = tmp_path / "small.safetensors"
    assert answer.json["bytes"] == path.stat().st_size and answer.json["params_kept"] == answer.json["params"]
    assert sum("quantized" in entry for entry in structure(vitlr.load(path)).values()) == 8
    assert len(run("inspect", path, "--json").json["rounded"]) == 8
    assert "rounded" in run("inspect", path).out


def test_rounds_measure_again(run, squeeze, tmp_path):
    """The file says what is left of the dense model, and compares with it; the plan's file says the same."""
    file = tmp_path / "plan.json"
    how = ("--method", "joint", "--rounds", "2", *STEPS)
    answer = run(*squeeze(*how, "--plan-out", file, "--json", budget="params:60%"))
    small = vitlr.load(tmp_path / "small.safetensors")
    kept, whole = answer.json["params_kept"], answer.json["params"]
    assert sum(p.numel() for p in small.parameters()) == kept <= 0.6 * whole
    plan = small.vitlr_info["plan"]
    assert plan["budget"] == "params:60%" and plan["params"] == whole and small.vitlr_info["recipe"]["rounds"] == 2
    written = vitlr.Plan.load(file)
    assert written.to_dict() == plan and len(written.earlier) == 1
    said = run(*squeeze(*how, "--plan-only", "--plan-out", file, budget="params:60%", out=None)).out
    assert "1 earlier round of widths left" in said and vitlr.Plan.load(file) == written


def test_rounds_measure_as_before_and_leave_out_what_is_excluded(run, squeeze, tmp_path, monkeypatch):
    stats, seen = tmp_path / "s.safetensors", []
    measure = ("--stats", stats, "--method", "joint", *STEPS)
    run(*squeeze(*measure, "--objective", "loss", "--samples", "2", "--seed", "5", "--plan-only"))
    calibrate = compression.calibrate

    def watched(*args, **options):
        asked = options["options"]
        seen.append((asked.objective, asked.samples, asked.seed, options["resume"]))
        return calibrate(*args, **options)

    monkeypatch.setattr(compression, "calibrate", watched)
    answer = run(*squeeze(*measure, "--rounds", "2", "--exclude", r"blocks\.0", "--json"))
    assert answer.status == 0 and seen[1:] == [("loss", 2, 5, None)]  # the first round's are in the file
    assert seen[0][-1] == stats
    small = vitlr.load(tmp_path / "small.safetensors")
    assert {name.split(".")[1] for name in structure(small)} == {"1"}


def test_attention_may_lose_heads_or_channels(run, refused, squeeze, tmp_path):
    stats = tmp_path / "s.safetensors"
    run(*squeeze("--stats", stats, "--method", "widths", "--plan-only"))
    heads = ("--stats", stats, "--method", "widths", "--prune-attention", "heads", *STEPS)
    assert "no moments of value channels" in refused(*squeeze(*heads))
    stats.unlink()
    answer = run(*squeeze(*heads, "--json", budget="params:57%"))
    small = vitlr.load(tmp_path / "small.safetensors")
    assert sum(p.numel() for p in small.parameters()) == answer.json["params_kept"]
    rows = run("inspect", tmp_path / "small.safetensors", "--json").json["heads"]
    assert rows and all((row["heads"], row["full_heads"]) == (1, 2) for row in rows)
    seen = run("inspect", tmp_path / "small.safetensors").out
    assert re.search(r"^blocks\.\d\.attn +narrowed +1 of 2 +heads kept$", seen, re.MULTILINE)
    channels = squeeze(
        "--stats", stats, "--method", "joint", "--prune-attention", "channels", *STEPS, budget="params:45%"
    )
    assert run(*channels).status == 0
    seen = run("inspect", tmp_path / "small.safetensors").out
    assert re.search(r"^blocks\.\d\.attn\.\w+ +narrowed +\d+/\d+ x \d+/\d+ +channels kept$", seen, re.MULTILINE)
    assert max(map(len, seen.splitlines()[:-6])) <= 80
    assert run(*squeeze("--stats", stats, "--method", "widths+ranks", *STEPS)).status == 0


def test_the_default_is_the_best_that_can_be_had_and_says_so(run, squeeze, tmp_path):
    answer = run(*squeeze(*STEPS))
    assert answer.status == 0 and "method joint: " in answer.err
    assert vitlr.load(tmp_path / "small.safetensors").vitlr_info["plan"]["method"] == "joint"
    asked = run(*squeeze(*STEPS, "--method", "joint"))
    assert "method joint" not in asked.err, "it was asked for"
    stats = tmp_path / "s.safetensors"
    run(*squeeze("--stats", stats, "--method", "lowrank", "--plan-only"))
    assert "method lowrank: " in run(*squeeze("--stats", stats, "--plan-only")).err


def test_old_words_are_understood(run, squeeze, tmp_path):
    flags = ("--method", "prune", "--prune-attention", "scores", "--plan-only", "--plan-out", tmp_path / "plan.json")
    assert run(*squeeze(*flags, *STEPS)).status == 0
    body = json.loads((tmp_path / "plan.json").read_text())
    assert body["method"] == "widths" and {row["kind"] for row in body["widths"]} == {"mlp", "query_keys"}
