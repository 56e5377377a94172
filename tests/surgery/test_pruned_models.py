"""A model with channels taken out is a model like any other: saved, loaded elsewhere, counted, exported, compressed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from families import arguments, make
from safetensors.torch import save_file

import vitlr
from vitlr.checkpoint.structure import restructure, structure
from vitlr.errors import InputError
from vitlr.measuring.cost import count_macs, count_params
from vitlr.nn import LowRankLinear, SelectedLinear
from vitlr.pruning.channels import remove_channels
from vitlr.pruning.gates import add_gates, gates, remove_gates
from vitlr.pruning.thresholds import choose


def pruned(model, rate=0.4, **options):
    """A model cut at gates drawn at random."""
    gated = add_gates(model)
    for gate in gates(gated).values():
        gate.a.data = torch.rand_like(gate.a)
    cut = choose(gated, rate, **options)
    return remove_channels(remove_gates(gated), {n: g.site for n, g in gates(gated).items()}, cut.keep).eval()


def with_low_rank(model):
    for block in model.blocks:
        block.attn.qkv = LowRankLinear.from_linear(block.attn.qkv, 6)
        block.mlp.fc1 = LowRankLinear.from_linear(block.mlp.fc1, 5)
    return model


def test_it_loads_in_a_fresh_process(tiny_vit, images, tmp_path):
    small = pruned(with_low_rank(tiny_vit()))
    path = tmp_path / "small.safetensors"
    vitlr.save(small, path)
    with torch.no_grad():
        save_file({"images": images, "logits": small(images)}, tmp_path / "expected.safetensors")
    code = (
        "import sys, torch, vitlr; from safetensors.torch import load_file; "
        "small = vitlr.load(sys.argv[1]); expected = load_file(sys.argv[2]); "
        "print(torch.equal(small(expected['images']), expected['logits']))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "expected.safetensors"], capture_output=True, text=True
    )
    assert answer.stdout.strip() == "True", answer.stderr
    assert structure(vitlr.load(path)) == structure(small)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"])
def test_other_families_come_back_too(name, tmp_path):
    model, images = make(name)
    small = pruned(model)
    vitlr.save(small, tmp_path / "small.safetensors", model_args=arguments(name)[0])
    with torch.no_grad():
        assert torch.equal(vitlr.load(tmp_path / "small.safetensors")(images), small(images))


def test_what_a_file_says_is_checked(tiny_vit):
    small = pruned(tiny_vit())
    described = structure(small)
    name = "blocks.0.attn.qkv"
    assert set(described[name]) == {"inputs", "outputs", "in_features", "out_features", "bias"}
    for change, said in (
        ({"inputs": 33}, "inputs 33, expected 1 to 32"),
        ({"outputs": 0}, "outputs 0, expected"),
        ({"outputs": True}, "outputs True, expected"),
        ({"in_features": 31}, "expected {'in_features': 32"),
        ({"bias": 1}, "bias 1, expected one of True, False"),
    ):
        with pytest.raises(InputError, match=said):
            restructure(tiny_vit(), {**described, name: {**described[name], **change}})
    with pytest.raises(InputError, match=r"'blocks\.0\.norm1' is no linear layer"):
        restructure(tiny_vit(), {"blocks.0.norm1": described[name]})


def test_channels_of_a_file_out_of_range_are_refused(tiny_vit, images):
    small = pruned(tiny_vit())
    state = small.state_dict()
    state["blocks.0.attn.qkv.inputs"] = state["blocks.0.attn.qkv.inputs"] + 32
    twin = restructure(tiny_vit(), structure(small))
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.qkv\.inputs: expected increasing"):
        twin.load_state_dict(state, strict=True, assign=True)


def test_it_costs_what_is_left(tiny_vit, images):
    model = tiny_vit()
    small, one = pruned(model, 0.5), images[:1]
    assert count_params(small) < 0.75 * count_params(model) and count_macs(small, one) < 0.75 * count_macs(model, one)
    dense = vitlr.to_dense(small)
    assert not any(isinstance(m, SelectedLinear) for m in dense.modules())
    with torch.no_grad():
        assert torch.allclose(dense(images), small(images), atol=1e-5)


def test_it_is_compressed_further(tiny_vit, batches, images, tmp_path):
    small = pruned(tiny_vit())
    stats = vitlr.calibrate(small, batches)
    assert "blocks.0.attn.qkv.linear" in stats.layers
    plan = vitlr.plan(small, stats, "params:80%", rank_step=1)
    again = vitlr.apply(small, plan)
    assert any(name.endswith(".linear") for name in plan.ranks)
    vitlr.save(again, tmp_path / "again.safetensors", plan=plan)
    loaded = vitlr.load(tmp_path / "again.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), again(images))
    assert json.loads(json.dumps(structure(again))) == structure(loaded)


def test_fusing_leaves_selected_layers_alone(tiny_vit, images):
    small = pruned(with_low_rank(tiny_vit()))
    fused = vitlr.fuse(small)
    assert [type(m) for m in fused.modules() if isinstance(m, SelectedLinear)]
    with torch.no_grad():
        assert torch.allclose(fused(images), small(images), atol=1e-5)
        assert torch.allclose(vitlr.unfuse(fused)(images), small(images), atol=1e-5)


def test_hidden_widths_alone_still_fuse(tiny_vit, images):
    model = with_low_rank(tiny_vit())
    gated = add_gates(model, "fc2")
    for gate in gates(gated).values():
        gate.a.data = torch.rand_like(gate.a)
    cut = choose(gated, 0.4, tile=8)
    small = remove_channels(remove_gates(gated), {n: g.site for n, g in gates(gated).items()}, cut.keep)
    fused = vitlr.fuse(small)
    assert vitlr.surgery.fusion.fused_names(fused)
    with torch.no_grad():
        assert torch.allclose(fused(images), small(images), atol=1e-5)


def test_it_exports(tiny_vit, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small = pruned(with_low_rank(tiny_vit()))
    with torch.no_grad():
        expected = small(images)
    assert torch.allclose(torch.export.export(small, (images,)).module()(images), expected, atol=1e-5)
    torch.onnx.export(small, (images,), tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert torch.allclose(torch.from_numpy(out), expected, atol=1e-4)


def test_what_was_pruned_is_not_pruned_again(tiny_vit):
    small = pruned(tiny_vit())
    with pytest.raises(InputError, match=r"blocks\.0\.attn: channels were taken out of blocks\.0\.attn\.qkv already"):
        add_gates(small)
    with pytest.raises(InputError, match=r"channels were taken out of blocks\.0\.mlp\.fc1 already"):
        add_gates(small, "fc2")
