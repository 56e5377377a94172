"""Every bad input: one clear line, exit status 2, nothing half-written."""

from __future__ import annotations

import pytest
import torch
from commandline import NAME, TINY, nothing_left
from safetensors.torch import save_file

import vitlr
from vitlr.runtime import storage


def test_what_can_be_refused_first_is(refused, squeeze, tmp_path, unread):
    assert "'params:lots' cannot be read" in refused(*squeeze(budget="params:lots"))
    assert "out of range" in refused(*squeeze(budget="params:140%"))
    assert "--out is missing" in refused(*squeeze(out=None))
    assert "cannot write" in refused(*squeeze(out=tmp_path / "nowhere" / "small.safetensors"))
    assert "it is a folder" in refused(*squeeze(out=tmp_path))
    assert "cannot write" in refused(*squeeze(stats=tmp_path / "nowhere" / "stats.safetensors"))
    assert "name two files" in refused(*squeeze(stats=tmp_path / "small.safetensors"))
    assert "unknown --objective 'best', expected one of" in refused(*squeeze(objective="best"))
    assert "--rank-buckets" in refused(*squeeze("--uniform", rank_buckets=2))
    assert "--centred" in refused(*squeeze("--centred", objective="normalized"))
    assert "--device 'tpu9' is unknown" in refused(*squeeze(device="tpu9"))
    assert "key=value" in refused(*squeeze(model_kwargs="depth"))
    assert "given twice" in refused(*squeeze(model_kwargs="num_classes=7"))
    assert nothing_left(tmp_path, "small.safetensors", "stats.safetensors")


def test_no_output_replaces_an_input_or_a_stranger(refused, squeeze, tmp_path, weights, unread):
    before = weights.read_bytes()
    assert "--out and --checkpoint are both" in refused(*squeeze(out=weights))
    assert "--stats and --checkpoint are both" in refused(*squeeze(stats=weights))
    copy = tmp_path / "my_only_copy.safetensors"
    copy.write_bytes(before)
    assert "is no vitlr model" in refused(*squeeze(out=copy))
    assert copy.read_bytes() == weights.read_bytes() == before


def test_models_and_checkpoints_that_do_not_fit(refused, squeeze, tmp_path, weights):
    assert "did you mean vit_tiny" in refused("inspect", "vit_tny_patch16_224")
    assert "did you mean vit_tiny" in refused(*[a if a != NAME else "vit_tny_patch16_224" for a in squeeze()])
    assert "no such file" in refused("validate", tmp_path / "none.safetensors", "--data", tmp_path)
    assert "was not written by vitlr" in refused("inspect", weights)
    assert "cannot read checkpoint" in refused(*squeeze(checkpoint=tmp_path / "none.safetensors"))
    assert "does not fit" in refused(*squeeze(checkpoint=weights)[:-1], "num_heads=2", "mlp_ratio=2")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "not a whole safetensors file" in refused(*squeeze())
    assert nothing_left(tmp_path, "small.safetensors")


def test_data_that_cannot_be_used(refused, squeeze, tmp_path, image_folder, weights):
    (tmp_path / "empty").mkdir()
    broken = image_folder(name="broken", classes=("a", "b"), images=2)
    for path in broken.rglob("*.jpg"):
        path.write_bytes(b"no image")
    assert "no data at" in refused(*squeeze(data=tmp_path / "none"))
    assert "there are none" in refused(*squeeze(data=tmp_path / "empty"))
    assert "--data is missing" in refused(*squeeze(data=None))
    assert "none of the 4 images" in refused(*squeeze(data=broken, stats=tmp_path / "stats.safetensors"))
    check = ["validate", NAME, "--checkpoint", weights, *TINY]
    assert "give a class map" in refused(*check, "--data", broken)
    (tmp_path / "map.txt").write_text("a\nb\nc\n")
    (tmp_path / "other.txt").write_text("v\nw\nx\ny\nz\n")
    assert "has 3 classes, the model 5" in refused(*check, "--data", broken, "--class-map", tmp_path / "map.txt")
    assert "names none of" in refused(*check, "--data", broken, "--class-map", tmp_path / "other.txt")
    assert "names none of" in refused(*squeeze(data=broken, class_map=tmp_path / "other.txt"))
    assert "--data is missing" in refused(*check)
    assert nothing_left(tmp_path, "small.safetensors", "stats.safetensors")


def test_budget_that_cannot_be_reached_says_what_can(run, squeeze, tmp_path):
    answer = run(*squeeze(budget="params:10%"))
    assert answer.status == 2 and "cannot be reached" in answer.err and "keeps" in answer.err.splitlines()[-1]
    assert nothing_left(tmp_path, "small.safetensors")


def test_a_model_without_linears(refused, image_folder, tmp_path):
    args = ["compress", "resnet18", "--budget", "params:50%", "--out", tmp_path / "o.safetensors"]
    torch.save(vitlr.create_model("resnet18", num_classes=5).state_dict(), tmp_path / "w.pth")
    data = image_folder(classes=("a",), images=1)
    line = refused(*args, "--checkpoint", tmp_path / "w.pth", "--num-classes", 5, "--data", data)
    assert "no linear that can be compressed" in line and nothing_left(tmp_path, "o.safetensors")


def test_patterns_are_checked_before_images_are_read(refused, squeeze, monkeypatch):
    monkeypatch.setattr("vitlr.data.loader.open_data", lambda *a, **k: pytest.fail("too late"))
    assert "is not a regular expression" in refused(*squeeze(include="("))
    assert "matches no compressible linear" in refused(*squeeze(exclude="lstm"))


def test_statistics_that_do_not_fit_are_refused_and_left_alone(run, refused, squeeze, tmp_path, image_folder, tiny_vit):
    stats = tmp_path / "stats.safetensors"
    assert run(*squeeze("--plan-only", stats=stats, include="mlp")).status == 0
    written = stats.read_bytes()
    other = tmp_path / "other.safetensors"
    save_file(tiny_vit(seed=1).state_dict(), other)
    assert "other weights" in refused(*squeeze(stats=stats, checkpoint=other))
    assert "--objective fisher, not normalized" in refused(*squeeze(stats=stats, objective="normalized"))
    assert "--samples 1, not 3" in refused(*squeeze(stats=stats, samples=3))
    assert "of other layers (blocks.0.attn.qkv)" in refused(*squeeze(stats=stats))
    within = {"stats": stats, "include": "mlp"}
    assert "20 images of folder, this run asks for 10" in refused(*squeeze(limit=10, **within))
    assert "images of another" in refused(*squeeze(data=image_folder(name="another", images=4), **within))
    # The layers' weights are the same at another image size; what they saw is not.
    larger = tiny_vit(img_size=40)
    larger.load_state_dict({k: v for k, v in tiny_vit().state_dict().items() if k != "pos_embed"}, strict=False)
    save_file(larger.state_dict(), other)
    at_40 = [a if a != "32" else "40" for a in squeeze(**within, checkpoint=other)]
    assert "images (3, 32, 32), the model takes (3, 40, 40)" in refused(*at_40)
    assert stats.read_bytes() == written

    stats.write_bytes(written[: len(written) // 2])
    assert "not a whole safetensors file" in refused(*squeeze(stats=stats))
    storage.save_tensors(stats, {}, {}, kind="statistics", schema=99)
    assert "schema 99" in refused(*squeeze(stats=stats))
    save_file({"x": torch.zeros(1)}, stats)
    assert "was not written by vitlr" in refused(*squeeze(stats=stats))
    assert nothing_left(tmp_path, "small.safetensors")


def test_options_that_a_file_has_no_use_for(run, refused, squeeze, tmp_path, weights):
    run(*squeeze())
    out = tmp_path / "small.safetensors"
    assert "--checkpoint goes with a timm name" in refused("inspect", out, "--checkpoint", weights)
    assert "num_classes goes with a timm name" in refused("bench", out, "--num-classes", 7)
    assert "cannot be read" in refused("bench", out, "--batch-size", "1,x")
    assert "--precision 'int3' is unknown" in refused("bench", out, "--precision", "int3")
    assert "goes with --reference" in refused("validate", out, "--data", tmp_path, "--reference-checkpoint", weights)
    other = ["--reference", NAME, "--checkpoint", weights, "--model-kwargs", "in_chans=1"]
    assert "error" in refused("validate", out, "--data", tmp_path / "folder", *other)
