"""`vitlr prune`: what it writes and reports, how it goes on, what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from commandline import NAME, TINY, nothing_left

import vitlr
from vitlr.measuring.cost import count_params
from vitlr.nn import LowRankLinear
from vitlr.training import state as training_state

QUICK = {"tile": 1, "epochs": 2, "lr": 0.005, "batch-size": 8, "warmup-epochs": 0}
KEYS = ["out", "params", "params_kept", "macs", "macs_kept", "bytes", "cut", "ranks", "kept_epoch", "notes"]
KEYS += ["images", "skipped", "seconds"]


@pytest.fixture
def prune(weights, image_folder, tmp_path):
    """The arguments of a small `prune`; keywords replace or add options, None takes one out."""
    data = image_folder(images=4, name="labelled")
    usual = {"checkpoint": weights, "data": data, "rate": 0.3, "out": tmp_path / "pruned.safetensors"}

    def make(*flags, model=NAME, **options):
        options = {**usual, **QUICK, **{key.replace("_", "-"): value for key, value in options.items()}}
        given = [text for key, value in options.items() if value is not None for text in (f"--{key}", value)]
        return ["prune", model, *given, *flags, *TINY]

    return make


def test_it_writes_a_smaller_model_and_says_what_went(run, prune, tmp_path):
    values = run(*prune("--json", l1=0.01, thresholds="type", val_data=tmp_path / "labelled")).json
    assert list(values) == KEYS and values["notes"] == [] and values["images"] == 20 and values["skipped"] == 0
    small = vitlr.load(tmp_path / "pruned.safetensors")
    assert count_params(small) == values["params_kept"] == values["cut"]["params_kept"] < values["params"]
    assert values["macs_kept"] < values["macs"] and values["ranks"] is None and values["kept_epoch"] in (1, 2)
    for kind in values["cut"]["kinds"].values():
        assert 1 - kind["kept"] / kind["gates"] == pytest.approx(0.3, abs=0.02)
    recipe = small.vitlr_info["recipe"]["pruning"]
    assert recipe["cut"] == values["cut"] and recipe["gates"]["epochs"][0]["penalty"] > 0
    assert run("validate", tmp_path / "pruned.safetensors", "--data", tmp_path / "labelled").status == 0
    seen = run("inspect", tmp_path / "pruned.safetensors")
    kept = values["cut"]["widths"]["blocks.0.attn.qkv"]
    line = rf"^blocks\.0\.attn\.qkv +narrowed +\d+/\d+ x {kept}/32 +channels kept$"
    assert seen.status == 0 and re.search(line, seen.out, re.MULTILINE)


def test_people_read_a_table(run, prune):
    answer = run(*prune(gates="fc1,fc2", budget="params:70%", rate=None, tile=4, finetune_epochs=0))
    assert answer.status == 0, answer.err
    assert "feed-forward" in answer.out and "global threshold, params:70%" in answer.out and "wrote" in answer.out
    assert "attention" not in answer.out and "fine-tuning" not in answer.out and "pruning: " in answer.err


def test_the_hybrid_and_its_low_rank_arm(run, prune, tmp_path):
    first = run(*prune("--json", "--hybrid", rate=None, budget="params:60%", share=0.5, rank_step=1)).json
    small = vitlr.load(tmp_path / "pruned.safetensors")
    assert isinstance(small.blocks[0].attn.qkv, LowRankLinear) and first["params_kept"] <= 0.6 * first["params"]
    assert set(first["cut"]["kinds"]) == {"fc1", "fc2"} and all(".attn." in name for name in first["ranks"])
    stats = tmp_path / "stats.safetensors"
    arm = prune("--json", "--low-rank-only", "--allocated", rate=None, budget="params:60%", rank_step=1, stats=stats)
    second = run(*arm).json
    assert second["cut"] is None and any(".mlp." in name for name in second["ranks"]) and stats.exists()
    assert second["kept_epoch"] == 2 and second["params_kept"] <= 0.6 * second["params"]


def test_a_compressed_file_is_pruned_further_and_without_labels(run, squeeze, prune, tmp_path):
    small, flat = tmp_path / "small.safetensors", tmp_path / "flat"
    assert run(*squeeze(out=small)).status == 0
    flat.mkdir()
    for i, path in enumerate(sorted((tmp_path / "labelled").rglob("*.jpg"))):
        (flat / f"{i}.jpg").write_bytes(path.read_bytes())
    given = prune("--json", model=small, checkpoint=None, data=flat, distill_loss_weight=1)[: -len(TINY)]
    values = run(*given).json
    pruned = vitlr.load(tmp_path / "pruned.safetensors")
    assert values["params_kept"] < values["params"] == count_params(vitlr.load(small))
    assert pruned.vitlr_info["recipe"]["budget"] == "params:70%"  # what was done before is remembered
    assert pruned.vitlr_info["recipe"]["pruning"]["gates"]["epochs"][0]["distillation"] is not None


@pytest.mark.parametrize(
    ("hybrid", "at"),
    [
        pytest.param((), 4, id="gates"),
        pytest.param((), 9, id="fine-tuning"),
        pytest.param(("--hybrid", "--rank-step", "1"), 9, id="hybrid"),
    ],
)
def test_an_interrupted_run_goes_on(run, prune, tmp_path, monkeypatch, hybrid, at):
    whole, kept = tmp_path / "whole.safetensors", tmp_path / "kept"
    assert run(*prune(*hybrid, out=whole, epochs=3)).status == 0  # two updates an epoch
    real, seen = training_state.State.update, []

    def interrupt(self):
        seen.append(1)
        if len(seen) == at:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(training_state.State, "update", interrupt)
    answer = run(*prune(*hybrid, epochs=3, resume=kept))
    assert answer.status == 130 and str(kept) in answer.err and nothing_left(tmp_path, "pruned.safetensors")
    monkeypatch.setattr(training_state.State, "update", real)
    assert run(*prune(*hybrid, epochs=3, resume=kept)).status == 0
    first, second = (vitlr.load(path).state_dict() for path in (whole, tmp_path / "pruned.safetensors"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert "another run" in run(*prune(*hybrid, epochs=3, resume=kept, l1=0.5)).err


def test_without_a_folder_it_says_how_to_have_gone_on(run, prune, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_state.State, "update", interrupt)
    answer = run(*prune())
    assert answer.status == 130 and "--resume DIR" in answer.err


@pytest.mark.parametrize(
    ("flags", "options", "said"),
    [
        ((), {"rate": 1.0}, "between 0 and 1"),
        ((), {"rate": -0.2}, "between 0 and 1"),
        ((), {"rate": None}, "either a rate"),
        ((), {"budget": "params:50%"}, "either a rate"),
        ((), {"rate": None, "budget": "macs:50%"}, "counts parameters"),
        ((), {"rate": None, "budget": "half"}, "cannot be read"),
        ((), {"thresholds": "layer"}, "unknown --thresholds 'layer'"),
        ((), {"gates": "mlp"}, "unknown gates 'mlp'"),
        ((), {"data": None}, "--data is missing"),
        ((), {"out": None}, "--out is missing"),
        ((), {"share": 0.5}, "--share goes with --hybrid"),
        (("--allocated",), {}, "--allocated goes with --hybrid"),
        (("--hybrid",), {"share": 1.5}, "--share 1.5"),
        (("--hybrid", "--low-rank-only"), {}, "leave one of them out"),
        (("--low-rank-only",), {}, "--rate does not go with --low-rank-only"),
        (("--low-rank-only",), {"rate": None}, "needs a --budget"),
        ((), {"lr": -1}, "--lr -1"),
        ((), {"opt": "best"}, "--opt 'best'"),
        ((), {"distill_loss_weight": 2}, "--distill-loss-weight 2"),
    ],
)
def test_bad_usage_is_refused_early(refused, prune, monkeypatch, flags, options, said):
    def fail(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr("vitlr.cli.models.create_model", fail)
    assert said in refused(*prune(*flags, **options))


def test_more_bad_usage(refused, prune, tmp_path, weights, image_folder):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(*prune(resume=tmp_path / "file"))
    assert "is no vitlr model" in refused(*prune(out=weights, checkpoint=None))
    three = image_folder(classes=("a", "b", "c"), name="three")
    assert "has 3 classes, the model has 5" in refused(*prune(data=three))


def test_models_that_cannot_be_pruned_are_named(refused, prune, tmp_path):
    args = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_classes": 5}
    path = tmp_path / "convnext.safetensors"
    vitlr.save(vitlr.create_model("convnext_tiny", **args), path)
    given = prune(model=path, checkpoint=None)[: -len(TINY)]
    assert "ConvNeXt has no attention block to prune. Supported: timm" in refused(*given)


def test_a_training_that_fails_says_so(run, prune):
    answer = run(*prune(lr=1e9, clip_grad=1e9))
    assert answer.status == 1 and "the gates are untrained: the loss was" in answer.err
