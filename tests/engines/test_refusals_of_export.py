"""What cannot be exported says which part of it, in one line, and leaves nothing behind."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import nn

import vitlr
from vitlr.engines import export as page
from vitlr.engines import graphs, installed
from vitlr.engines.export import export
from vitlr.engines.running import OnnxRuntime
from vitlr.errors import InputError, RunError

IMAGES = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))


class Odd(nn.Module):
    """Bessel's function, which ONNX has not."""

    def forward(self, x):
        return torch.special.bessel_j0(x)


class Branch(nn.Module):
    """Goes one way or the other, by what it sees."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(("part", "said"), [(Odd(), "bessel_j0"), (Branch(), "its forward")])
def test_what_cannot_be_said_is_named_with_its_module(part, said, tmp_path, capfd):
    model = nn.Sequential(nn.Flatten(2), nn.Sequential(nn.Linear(32, 8), part))
    with pytest.raises(RunError, match=rf"the model cannot be exported: \S*{said}\S* in 1\.1: ") as caught:
        export(model, tmp_path / "odd.onnx", images=IMAGES)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


def test_a_model_of_one_size_is_not_exported_for_any(vit, tmp_path):
    with pytest.raises(RunError, match="takes images of one size only: export it without a dynamic size"):
        export(vit, tmp_path / "vit.onnx", dynamic_size=True)
    assert not list(tmp_path.iterdir())


def test_an_engine_that_answers_otherwise_leaves_no_file(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Flatten(2), nn.Linear(32, 8))
    (tmp_path / "model.onnx").write_bytes(b"what was there")
    monkeypatch.setattr(OnnxRuntime, "answer", lambda self, x: torch.zeros(len(x), 3, 8).numpy())
    with pytest.raises(RunError, match=r"onnxruntime answers otherwise than the model: its logits are off by 1,"):
        export(model, tmp_path / "model.onnx", images=IMAGES)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"what was there"]


def test_what_rounding_may_move_is_that_of_every_image_that_is_checked(vit, many, stats, tmp_path):
    """One image alone may be moved further than a batch: that is no fault of an engine."""
    small = vitlr.fuse(vit, bits=8, stats=stats)
    exact, shown = vitlr.to_dense(small), many[:8]
    with torch.no_grad():
        moved = [page.difference(exact(x), vitlr.unfuse(small)(x)) for x in (shown, shown[:1])]
    done = export(small, tmp_path / "m.onnx", images=shown)
    assert moved[0] != moved[1] and done.allowed == pytest.approx(max(1e-3, 2 * max(moved)), rel=1e-3)
    assert max(done.differences.values()) <= done.allowed


def test_a_layer_of_bytes_that_is_lost_on_the_way_is_missed(vit, many, stats, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "fold_norms", lambda graph: [_spoil(node) for node in graph])

    def _spoil(node):
        if node.op_type == "MatMul" and node.inputs[1].producer() is not None:
            producer = node.inputs[1].producer()
            if producer.op_type == "DequantizeLinear":
                node.replace_input_with(1, producer.inputs[0])

    with pytest.raises(RunError, match="4 layers multiply bytes, 0 products of the graph do"):
        export(vit, tmp_path / "int8.onnx", bits=8, stats=stats)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime", "openvino"])
def test_a_package_that_is_missing_is_named_with_its_extra(package, vit, tmp_path, monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(installed.importlib, "import_module", without)
    path = tmp_path / ("vit.xml" if package == "openvino" else "vit.onnx")
    extra = "openvino" if package == "openvino" else "onnx"
    with pytest.raises(InputError, match=rf'needs {package}, which is not installed: pip install "vitlr\[{extra}\]"'):
        export(vit, path)


def test_places_and_numbers_that_are_none(vit, stats, tmp_path):
    for path, how, said in (
        ("vit.bin", {}, "expected one of onnx, openvino, or a path in .onnx or .xml"),
        ("vit.onnx", {"to": "tensorrt"}, "to='tensorrt' for vit.onnx"),
        ("vit.xml", {"to": "onnx"}, r"vit\.xml cannot be for onnx: such files end in \.onnx"),
        ("nowhere/vit.onnx", {}, "cannot write"),
        ("vit.onnx", {"batch_size": 0}, "batch_size=0, expected at least 1"),
        ("vit.onnx", {"bits": 4, "stats": stats}, "bits=4: expected 8"),
        ("vit.onnx", {"bits": 8}, "bits=8 and stats= go together"),
    ):
        with pytest.raises(InputError, match=said):
            export(vit, tmp_path / path, **how)
    assert not list(tmp_path.iterdir())


def test_statistics_of_other_weights_are_refused(tiny_vit, stats, tmp_path):
    with pytest.raises(InputError, match="other weights"):
        export(tiny_vit(depth=1, seed=1), tmp_path / "vit.onnx", bits=8, stats=stats)


@torch.no_grad()
def test_numbers_too_many_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_LARGEST", 1000)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(32, 64)).eval()
    done = export(model, tmp_path / "model.onnx", images=IMAGES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert done.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert torch.allclose(OnnxRuntime(tmp_path / "model.onnx", threads=1)(IMAGES), model(IMAGES), atol=1e-6)


def test_a_file_says_how_images_are_made_and_not_where_it_was_made(vit, tmp_path):
    onnx = pytest.importorskip("onnx")
    export(vit, tmp_path / "vit.onnx")
    notes = {entry.key: entry.value for entry in onnx.load(tmp_path / "vit.onnx").metadata_props}
    assert json.loads(notes["vitlr"])["input_size"] == [3, 32, 32]
    text = (tmp_path / "vit.onnx").read_bytes()
    assert vitlr.__file__.encode() not in text and b".py" not in text
