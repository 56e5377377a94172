"""The ladder: what it returns, keeps, reports and refuses."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import vitlr
from vitlr import InputError, NumericalError
from vitlr.refinement import RUNGS, Recipe, Refinement, ladder
from vitlr.refinement.images import Proxy
from vitlr.refinement.judge import Judge
from vitlr.refinement.recipe import parse_rungs
from vitlr.runtime import storage


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_every_rung_is_judged_on_held_out_images_and_the_model_comes_nearer(pair, proxy_images, quick):
    dense, small = pair
    before, original = copy.deepcopy(small), copy.deepcopy(dense)
    thrice = {**quick, "steps": 3 * quick["steps"]}  # a third of them for each of the rungs
    refined = vitlr.refine(small, dense, proxy_images, rungs="distil", **thrice)
    assert same(small, before) and same(dense, original), "inputs were touched"
    report = refined.vitlr_refinement
    assert isinstance(report, Refinement) and [rung.name for rung in report.rungs] == ["refit", "regrow", "distil"]
    assert (report.images, report.held_out) == (51, 9)
    judge = Judge(dense, Proxy(proxy_images).held, 50)
    assert judge(refined).kl == pytest.approx(report.rungs[-1].after.kl) and report.rungs[-1].kept
    assert judge(small).kl == pytest.approx(report.rungs[0].before.kl)
    for first, second in zip(report.rungs, report.rungs[1:], strict=False):
        assert second.before == (first.after if first.kept else first.before)
    assert judge(refined).kl < 0.9 * judge(small).kl
    assert json.loads(json.dumps(refined.vitlr_info["recipe"]["refinement"], allow_nan=False)) == json.loads(
        json.dumps(report.to_dict())
    )
    assert "kept" in str(report) and "held-out" in str(report)


@pytest.mark.parametrize("rungs", ["rescale", "refit", "regrow", "distil"])
def test_never_worse_whatever_a_rung_does(pair, proxy_images, quick, rungs, monkeypatch):
    dense, small = pair

    def ruin(model, *args):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(math.nan if rungs == "distil" else 0.5)
        return 1, ""

    monkeypatch.setattr(ladder, rungs, ruin)
    refined = vitlr.refine(small, dense, proxy_images, rungs=[rungs], **quick)
    (rung,) = refined.vitlr_refinement.rungs
    assert not rung.kept and same(refined, small)
    json.dumps(refined.vitlr_refinement.to_dict(), allow_nan=False)


def test_inplace_and_none(pair, proxy_images, quick):
    dense, small = pair
    assert vitlr.refine(small, dense, proxy_images, rungs=["distil"], inplace=True, **quick) is small
    untouched = vitlr.refine(small, dense, [], rungs="none")
    assert untouched is not small and same(untouched, small)


def test_the_report_travels_in_the_file(pair, proxy_images, quick, tmp_path):
    dense, small = pair
    refined = vitlr.refine(small, dense, proxy_images, rungs=["distil"], **quick)
    vitlr.save(refined, tmp_path / "f.safetensors")
    loaded = vitlr.load(tmp_path / "f.safetensors")
    assert loaded.vitlr_info["recipe"]["refinement"]["rungs"][0]["name"] == "distil"
    assert same(loaded, refined)


def test_modes_and_gradients_are_left_alone(pair, proxy_images, quick):
    dense, small = pair
    small.train()
    small.blocks[0].eval()
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    with torch.no_grad():
        refined = vitlr.refine(small, dense, proxy_images, **quick)
    assert torch.equal(torch.rand(()), expected)
    assert refined.training and not refined.blocks[0].training
    assert all(p.grad is None for p in [*dense.parameters(), *refined.parameters()])
    assert all(p.requires_grad for p in [*dense.parameters(), *refined.parameters()])


def test_rungs_are_cumulative_by_name_and_exact_by_list():
    assert parse_rungs("none") == () and parse_rungs("regrow") == ("refit", "regrow")
    assert parse_rungs(["distil", "refit"]) == ("refit", "distil")
    assert parse_rungs("rescale") == ("rescale",) and parse_rungs(["distil", "rescale"]) == ("rescale", "distil")


@pytest.mark.parametrize(
    "options",
    [
        {"rungs": "all"},
        {"rungs": ["distil", "finetune"]},
        {"steps": 0},
        {"steps": 2.5},
        {"minutes": 0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"ema": 1.0},
        {"batch_size": 1},
        {"epochs": 3},
        {"crop": 0},
        {"seed": -1},
        {"mixup": 1},
        {"amp": "no"},
        {"regrow_share": 1.0},
    ],
)
def test_bad_choices_are_refused_before_an_image_is_read(pair, options):
    dense, small = pair

    def unread():
        raise AssertionError("too late")
        yield

    with pytest.raises(InputError, match=next(iter(options)).replace("rungs", "rung")):
        vitlr.refine(small, dense, unread(), **options)


def test_too_few_images_and_images_all_alike(pair, proxy_images, quick):
    dense, small = pair
    with pytest.raises(InputError, match="31 images, expected at least 32"):
        vitlr.refine(small, dense, [torch.cat(proxy_images)[:31]], **quick)
    with pytest.raises(InputError, match="alike"):
        vitlr.refine(small, dense, [torch.ones(40, 3, 32, 32)], **quick)
    for loader, what in (
        (torch.cat(proxy_images), "one tensor"),
        ([torch.ones(40, 7)], "C, H, W"),
        ([["no tensor"]], "str"),
        ([{"a": torch.ones(4, 3, 8, 8), "b": torch.ones(4, 3, 8, 8)}], "2 tensors"),
    ):
        with pytest.raises(InputError, match=what):
            vitlr.refine(small, dense, loader, **quick)


def test_what_was_frozen_keeps_its_bits(pair, proxy_images, quick):
    dense, small = pair
    for module in small.modules():
        if isinstance(module, vitlr.LowRankLinear):  # cut without knowing the inputs: room for every rung
            module.down.weight.data += 0.05 * torch.randn_like(module.down.weight)
    frozen = {n: p for n, p in small.named_parameters() if n.startswith(("blocks.0", "blocks.1.mlp.fc1.up", "head"))}
    for p in frozen.values():
        p.requires_grad_(False)
    quick |= {"regrow_share": 0.5, "regrow_steps": 150}
    for rung, layers in (("refit", 3), ("regrow", 3), ("distil", None)):
        refined = vitlr.refine(small, dense, proxy_images, rungs=[rung], **quick)
        (report,) = refined.vitlr_refinement.rungs
        assert report.kept, rung
        assert all(torch.equal(refined.get_parameter(name), p) for name, p in frozen.items()), rung
        assert not refined.head.weight.requires_grad and refined.norm.weight.requires_grad
        assert layers is None or (
            f"of {layers} layers" in report.note and "5 low-rank layers left frozen" in report.note
        )


def test_a_model_of_which_nothing_may_move_is_refused(pair, proxy_images, quick):
    dense, small = pair
    for name, p in small.named_parameters():
        p.requires_grad_(name.startswith("head"))
    with pytest.raises(InputError, match="every low-rank layer has a frozen parameter"):
        vitlr.refine(small, dense, proxy_images, rungs="regrow", **quick)
    rungs = vitlr.refine(small, dense, proxy_images, rungs="distil", **quick).vitlr_refinement.rungs
    assert [rung.kept for rung in rungs] == [False, False, True]
    for rungs in RUNGS:
        with pytest.raises(InputError, match="every parameter of the model is frozen"):
            vitlr.refine(copy.deepcopy(small).requires_grad_(False), dense, proxy_images, rungs=[rungs], **quick)


@pytest.mark.parametrize("rung", ["refit", "regrow"])
def test_images_that_are_no_numbers_are_found_at_a_layer(pair, proxy_images, quick, rung):
    dense, small = pair
    images = [batch.clone() for batch in proxy_images]
    images[0][0] = math.nan  # not one of those held out
    with pytest.raises(NumericalError, match=r"blocks\.0\.\S+: its inputs or outputs hold NaN"):
        vitlr.refine(small, dense, images, rungs=[rung], **quick)


def test_other_images_are_another_run(pair, proxy_images, quick, tmp_path):
    dense, small = pair
    vitlr.refine(small, dense, proxy_images, rungs=["refit"], resume=tmp_path, **quick)
    with pytest.raises(InputError, match="another run: its images"):
        vitlr.refine(small, dense, [x + 1 for x in proxy_images], rungs=["refit"], resume=tmp_path, **quick)


def test_models_that_cannot_be_refined(pair, proxy_images, quick):
    dense, small = pair
    frozen = copy.deepcopy(small).requires_grad_(False)
    for model, what in (
        (dense, "no low-rank layer"),
        (vitlr.fuse(small), "fused"),
        (copy.deepcopy(small).bfloat16(), "bfloat16"),
        (frozen, "frozen"),
    ):
        with pytest.raises(InputError, match=what):
            vitlr.refine(model, dense, proxy_images, **quick)
    with pytest.raises(InputError, match="same object"):
        vitlr.refine(small, small, proxy_images, **quick)
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        vitlr.refine(small, dense, proxy_images, **quick)
    dense.head.bias.data[0] = math.nan
    with pytest.raises(NumericalError, match="dense"):
        vitlr.refine(small, dense, proxy_images, **quick)


def test_a_model_of_features_is_judged_by_their_direction(pair, proxy_images, quick):
    dense, small = pair
    for model in (dense, small):
        model.head = nn.Identity()
        model.num_classes = 0
    refined = vitlr.refine(small, dense, proxy_images, rungs=["distil"], **quick)
    (rung,) = refined.vitlr_refinement.rungs
    assert rung.kept and rung.after.kl < rung.before.kl and rung.after.agreement is None


def test_defaults_say_how_far():
    assert Recipe().most_steps == 1000 and Recipe(minutes=5.0).most_steps is None and Recipe(steps=7).most_steps == 7


def test_the_words_of_before_are_still_understood(pair, proxy_images, quick, tmp_path):
    """Arguments, and snapshots of an interrupted run: "joint" was distil, "residual" regrow."""
    dense, small = pair
    assert parse_rungs("joint") == RUNGS and parse_rungs(["joint", "residual"]) == ("regrow", "distil")
    options = {key.replace("regrow_", "residual_"): value for key, value in quick.items()}
    done = vitlr.refine(small, dense, proxy_images, rungs=["residual"], resume=tmp_path, **options)
    tensors, header = storage.load_tensors(tmp_path / "after_regrow.safetensors", kind="refinement", schema=1)
    old = json.dumps(header).replace("regrow", "residual")
    header = {key: value for key, value in json.loads(old).items() if key in ("run", "state")}
    storage.save_tensors(tmp_path / "after_residual.safetensors", tensors, header, kind="refinement", schema=1)
    (tmp_path / "after_regrow.safetensors").unlink()
    resumed = vitlr.refine(small, dense, proxy_images, rungs=["regrow"], resume=tmp_path, **quick)
    assert same(resumed, done) and resumed.vitlr_refinement == done.vitlr_refinement
