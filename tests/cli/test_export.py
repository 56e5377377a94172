"""`vitlr export`: what it writes and refuses."""

from __future__ import annotations

import pytest
import torch
from commandline import NAME, TINY

import vitlr
from vitlr.engines.running import OnnxRuntime

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


@torch.no_grad()
def test_a_compressed_file_is_written_for_an_engine(run, squeeze, tmp_path):
    run(*squeeze())
    out = tmp_path / "small.onnx"
    answer = run("export", tmp_path / "small.safetensors", "--out", out)
    assert f"wrote {out}: " in answer.out and "onnxruntime: logits within " in answer.out
    small, x = vitlr.load(tmp_path / "small.safetensors"), torch.randn(3, 3, 32, 32)
    assert torch.allclose(OnnxRuntime(out, threads=1)(x), small(x), atol=1e-4)


def test_int8_by_images_and_by_their_statistics(run, weights, image_folder, tmp_path):
    out, stats = tmp_path / "int8.onnx", tmp_path / "stats.safetensors"
    how = ("export", NAME, "--checkpoint", weights, "--out", out, "--bits", 8, "--stats", stats, "--json")
    first = run(*how, "--data", image_folder(images=4), *TINY).json
    assert first["products"] == first["int8"]["onnxruntime"] > 4 and first["files"] == [str(out)]
    again = run(*how, *TINY).json
    assert again["products"] == first["products"] and again["bytes"] == first["bytes"] == out.stat().st_size


def test_what_is_wrong_is_said_before_work_begins(refused, tmp_path, weights, unread):
    def export(*flags):
        return refused("export", NAME, "--checkpoint", weights, *flags, *TINY)

    out = ("--out", tmp_path / "vit.onnx")
    assert "--out is missing" in export()
    assert "expected one of onnx, openvino" in export("--out", tmp_path / "vit.bin")
    assert "--to 'trt' for vit.onnx" in export(*out, "--to", "trt")
    assert "cannot write" in export("--out", tmp_path / "nowhere" / "vit.onnx")
    assert "--bits 8 needs images" in export(*out, "--bits", "8")
    assert "--bits 4, expected 8; for fewer run vitlr compress --bits" in export(*out, "--bits", "4")
    assert "--data goes with --bits 8" in export(*out, "--data", tmp_path)
    assert "--objective goes with --bits 8" in export(*out, "--objective", "output")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_file_of_rounded_weights_multiplies_bytes(run, weights, image_folder, tmp_path):
    images, codes = image_folder(images=4), tmp_path / "codes.safetensors"
    how = ("--bits", 4, "--budget", "params:100%")
    run("compress", NAME, "--checkpoint", weights, "--data", images, *how, "--out", codes, *TINY)
    answer = run("export", codes, "--out", tmp_path / "int8.onnx", "--bits", 8, "--data", images, "--json").json
    assert answer["products"] == answer["int8"]["onnxruntime"] > 4


def test_a_file_that_multiplies_bytes_needs_no_images(run, tiny_vit, batches, tmp_path):
    model = tiny_vit()
    stats = vitlr.calibrate(model, batches, objective="output", hidden=False, extras=("ranges",))
    vitlr.save(vitlr.fuse(model, bits=8, stats=stats), tmp_path / "int8.safetensors")
    answer = run("export", tmp_path / "int8.safetensors", "--out", tmp_path / "int8.onnx", "--json").json
    assert answer["products"] == answer["int8"]["onnxruntime"] >= 6
