"""What people of this field do every day with a model, and what vitlr makes of it: it works, or says why not."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import vitlr
from vitlr.errors import InputError

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def compressed(model, batches, **options):
    return vitlr.compress(model, batches, "params:70%", rank_step=4, **options)


def test_a_parent_may_ask_a_layer_for_its_weights_dtype_and_device(tiny_vit, batches, tmp_path):
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_vit()

        def forward(self, x):
            fc1 = self.net.blocks[0].mlp.fc1
            qkv = self.net.blocks[1].attn.qkv
            return self.net(x.to(fc1.weight.dtype).to(qkv.weight.device)) * (fc1.weight.shape[0] / 128)

    for method in ("lowrank", "joint"):
        small = compressed(Casting(), batches, method=method)
        vitlr.save(small, tmp_path / "casting.safetensors")
        assert torch.equal(vitlr.load(tmp_path / "casting.safetensors", model=Casting())(X), small(X))
        assert small.bfloat16()(X).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "ask",
    [
        lambda fc: fc.weight.new_zeros(1),
        lambda fc: fc.weight.new_ones(2).sum() - fc.weight.new_tensor(2.0),
        lambda fc: torch.zeros(1).type(fc.weight.type()),
        lambda fc: torch.zeros(1, dtype=fc.weight.data.dtype),
        lambda fc: torch.zeros(1, dtype=fc.bias.dtype) + (fc.bias is None),
    ],
)
@pytest.mark.parametrize("method", ["lowrank", "bits", "values"])
def test_a_parent_may_ask_a_layer_for_what_is_no_weight(tiny_vit, batches, ask, method):
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_vit()

        def forward(self, x):
            return self.net(x + sum(ask(fc) for fc in (self.net.blocks[0].mlp.fc2, self.net.blocks[0].attn.qkv)))

    model = Asking()
    if method == "bits":
        small = vitlr.compress(model, batches, "bytes:40%", method="bits")
    elif method == "lowrank":
        small = compressed(model, batches, method="lowrank", uniform=True)
    else:
        small = model
        small.net.blocks[0].attn.qkv = vitlr.nn.SelectedLinear(model.net.blocks[0].attn.qkv, 32, 96)
    expected = small.net(X)
    assert torch.equal(small(X), expected)


def test_compiled_models_are_compressed_refined_and_saved_as_what_they_hold(tiny_vit, batches, tmp_path):
    model = tiny_vit()
    compiled = torch.compile(tiny_vit(), backend="eager")
    small = compressed(compiled, batches)
    assert torch.equal(small(X), compressed(model, batches)(X))
    assert list(vitlr.calibrate(compiled, batches).layers) == list(vitlr.calibrate(model, batches).layers)
    vitlr.save(torch.compile(small, backend="eager"), tmp_path / "small.safetensors")
    assert torch.equal(vitlr.load(tmp_path / "small.safetensors")(X), small(X))
    assert vitlr.fuse(torch.compile(small, backend="eager")).state_dict().keys() == small.state_dict().keys()


class Held(nn.Module):
    """A module that holds another, as training frameworks do."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def test_files_know_nothing_of_parts_that_were_compiled(tiny_vit, batches, tmp_path, caplog):
    def in_blocks():
        model = tiny_vit()
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, backend="eager")
        return model

    for made, plain in ((in_blocks, tiny_vit), (lambda: Held(torch.compile(tiny_vit(), backend="eager")), None)):
        caplog.clear()
        small = compressed(made(), batches)
        assert "model_args=" not in caplog.text
        names = list(small.state_dict())
        vitlr.save(small, tmp_path / "small.safetensors")
        assert list(small.state_dict()) == names and any("_orig_mod" in name for name in names)  # it is as it was
        if plain is not None:
            assert torch.equal(vitlr.load(tmp_path / "small.safetensors")(X), small(X))
        for model in (made(), (plain or (lambda: Held(tiny_vit())))()):
            assert torch.equal(vitlr.load(tmp_path / "small.safetensors", model=model)(X), small(X))


def test_compiled_models_are_evaluated_and_scripted_ones_named(tiny_vit, batches):
    compiled = torch.compile(tiny_vit(), backend="eager")
    assert vitlr.evaluate(compiled, batches, compiled) == vitlr.evaluate(tiny_vit(), batches, tiny_vit())
    for fixed in (torch.jit.trace(tiny_vit(), X), torch.jit.script(nn.Sequential(nn.Linear(4, 4)))):
        with pytest.raises(InputError, match=r"fixed by torch\.jit; give the one that it was scripted or traced from"):
            compressed(fixed, batches)


class WithPooler(nn.Module):
    """A second answer, of a layer that the first one passes by."""

    def __init__(self, net):
        super().__init__()
        self.net, self.pooler = net, nn.Linear(32, 24)

    def forward(self, x):
        h = self.net(x)
        return {"last": h, "pooled": self.pooler(h).tanh()}


def test_layers_of_another_output_stay_dense_where_no_gradient_is_asked_for_too(tiny_vit, batches, caplog):
    model = WithPooler(tiny_vit(num_classes=0)).eval()
    model.config = argparse.Namespace(model_type="hand")  # so that no head is looked for
    small = vitlr.compress(model, batches, "params:80%", objective="output", method="lowrank", rank_step=4)
    assert "1 layers stay dense (pooler): the answer does not depend on them" in caplog.text
    assert type(small.pooler) is nn.Linear and not torch.equal(small(X)["last"], model(X)["last"])


def test_layers_of_another_output_stay_dense_and_output_fn_reaches_them(tiny_vit, batches, caplog, tmp_path):
    model = WithPooler(tiny_vit(num_classes=0)).eval()
    model.config = argparse.Namespace(model_type="hand")  # so that no head is looked for
    stats = vitlr.calibrate(model, batches, resume=tmp_path / "stats.safetensors")
    assert len(stats.layers) == 8 and "pooler" not in stats.layers
    assert "1 layers stay dense (pooler): the answer does not depend on them" in caplog.text
    again = vitlr.calibrate(model, batches, resume=tmp_path / "stats.safetensors")
    assert again.images == stats.images and list(again.layers) == list(stats.layers)
    small = vitlr.apply(model, vitlr.plan(model, stats, "params:70%", rank_step=4))
    assert type(small.pooler) is nn.Linear and not torch.equal(small(X)["last"], model(X)["last"])
    assert "pooler" in vitlr.calibrate(model, batches, output_fn=lambda answer: answer["pooled"]).layers


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_fn": lambda out, batch: float(out.sum())}, "loss_fn= returned a float, expected one number"),
        (
            {"loss_fn": lambda out, batch: F.cross_entropy(out, batch[1], reduction="none")},
            r"loss_fn= returned a tensor \[4\], expected one number",
        ),
    ],
)
def test_losses_that_are_none_are_refused(tiny_vit, batches, options, said):
    with pytest.raises(InputError, match=said):
        vitlr.calibrate(tiny_vit(), batches, **options)


def test_models_without_weights_or_of_inference_mode_are_refused_and_left_alone(tiny_vit, batches):
    with pytest.raises(InputError, match="on the meta device"):
        vitlr.calibrate(tiny_vit().to("meta"), batches)
    with torch.inference_mode():
        model = tiny_vit()
    with pytest.raises(InputError, match=r"made under torch\.inference_mode"):
        vitlr.calibrate(model, batches)
    assert all(p.requires_grad for p in model.parameters())


def test_a_device_that_is_not_there_is_refused(tiny_vit, batches, tmp_path):
    vitlr.save(tiny_vit(), tmp_path / "m.safetensors")
    for device in ("nowhere", "cuda:77"):
        with pytest.raises(InputError, match=f"device {device} is not there"):
            vitlr.load(tmp_path / "m.safetensors", device=device)


def test_what_is_trained_is_kept_tensor_by_tensor(tiny_vit, batches):
    model = tiny_vit().requires_grad_(False)
    model.blocks[0].attn.qkv.bias.requires_grad_(True)
    model.blocks[1].mlp.fc1.weight.requires_grad_(True)
    small = compressed(model, batches, method="lowrank", uniform=True)
    first, second = small.blocks[0].attn.qkv, small.blocks[1].mlp.fc1
    assert (first.up.bias.requires_grad, first.up.weight.requires_grad, first.down.weight.requires_grad) == (
        True,
        False,
        False,
    )
    assert (second.up.bias.requires_grad, second.up.weight.requires_grad) == (False, True)


def test_scripting_works_with_every_method(tiny_vit, batches):
    for method in ("lowrank", "joint"):
        small = nn.Sequential(*compressed(tiny_vit(), batches, method=method).blocks[0].mlp.children())
        scripted = torch.jit.script(small.eval())
        x = torch.randn(2, 5, 32)
        assert torch.allclose(scripted(x), small(x), atol=1e-5)
    selected = vitlr.nn.SelectedLinear.from_linear(nn.Linear(6, 8), torch.tensor([0, 2]), torch.tensor([1, 3, 4]))
    x = torch.randn(3, 6)
    assert torch.equal(torch.jit.script(selected)(x), selected(x))


class Foreign(nn.Parameter):
    """A parameter of a quantiser."""


def test_a_quantised_model_is_not_saved(tiny_vit, batches, tmp_path):
    small = compressed(tiny_vit(), batches, method="lowrank")
    fc1 = small.blocks[0].mlp.fc1
    linear = fc1.up if hasattr(fc1, "up") else fc1
    linear.weight = Foreign(linear.weight.detach())
    with pytest.raises(InputError, match="is a Foreign, no plain tensor: save the model before it is quantised"):
        vitlr.save(small, tmp_path / "q.safetensors")


TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def prefixed(*prefixes):
    return lambda sd: {"".join(prefixes) + key: t for key, t in sd.items()}


CHECKPOINTS = {
    "Lightning": lambda sd: {"state_dict": {**prefixed("model.")(sd), "loss.weight": torch.ones(5)}, "epoch": 1},
    "Lightning around a data parallel net": lambda sd: {"state_dict": prefixed("net.", "module.")(sd)},
    "compiled": lambda sd: {"model": prefixed("_orig_mod.")(sd)},
    "model_state_dict": lambda sd: {"model_state_dict": sd, "optimizer_state_dict": {"state": {}}, "epoch": 1},
    "the best accuracy as a number of NumPy": lambda sd: {"model": sd, "best": np.float64(0.7), "n": np.int64(3)},
    "arguments of a script": lambda sd: {"state_dict": sd, "args": argparse.Namespace(lr=0.1)},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_training_scripts_are_read(tiny_vit, tmp_path, kind):
    model = tiny_vit()
    torch.save(CHECKPOINTS[kind](model.state_dict()), tmp_path / "ck.pth")
    read = vitlr.create_model("vit_tiny_patch16_224", checkpoint=tmp_path / "ck.pth", **TINY)
    assert torch.equal(read(X), model(X))


def test_checkpoints_that_are_none_name_the_remedy(tiny_vit, tmp_path):
    np.savez(tmp_path / "jax.npz", cls=np.zeros((1, 1, 32)))
    with pytest.raises(InputError, match="under the names of JAX; write it as safetensors first"):
        vitlr.create_model("vit_tiny_patch16_224", checkpoint=tmp_path / "jax.npz", **TINY)
    torch.save({"weights": [tiny_vit().norm.weight], "epoch": 1}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"a state_dict\), alone or under a key .*got weights, epoch"):
        vitlr.create_model("vit_tiny_patch16_224", checkpoint=tmp_path / "other.pth", **TINY)
    torch.save({"model": tiny_vit().state_dict(), "best": np.array(["a"], dtype=object)[0:1]}, tmp_path / "o.pth")
    vitlr.create_model("vit_tiny_patch16_224", checkpoint=tmp_path / "o.pth", **TINY)  # objects beside it are not read


def test_a_folder_with_timms_config_is_a_model(tiny_vit, batches, tmp_path):
    from timm.models import save_for_hf

    model = tiny_vit()
    model.pretrained_cfg["architecture"] = "vit_tiny_patch16_224"
    save_for_hf(model, tmp_path / "folder", model_args={k: v for k, v in TINY.items() if k != "num_classes"})
    read = vitlr.create_model(f"local-dir:{tmp_path / 'folder'}")
    assert torch.equal(read(X), model(X))
    vitlr.save(compressed(read, batches), tmp_path / "small.safetensors")
    assert vitlr.load(tmp_path / "small.safetensors")(X).shape == (4, 5)


def test_transformers_way_of_saving_is_refused_for_a_compressed_model(batches, tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**small, image_size=32, patch_size=8, num_labels=5)
    ).eval()
    less = compressed(model, batches, method="lowrank")
    with pytest.raises(InputError, match="save_pretrained writes no compressed model"):
        less.save_pretrained(tmp_path / "folder")
    vitlr.save(less, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="save_pretrained writes no compressed model"):
        vitlr.load(tmp_path / "m.safetensors", model=model).save_pretrained(tmp_path / "folder")
    less.save_pretrained(tmp_path / "checkpoint", state_dict=less.state_dict())  # as the Trainer does
    dense = vitlr.to_dense(less)
    dense.save_pretrained(tmp_path / "dense")
    again = type(model).from_pretrained(tmp_path / "dense").eval()
    assert torch.allclose(again(X).logits, less(X).logits, atol=1e-5)
    narrow = vitlr.compress(model, batches, "params:80%", rank_step=4, method="widths")
    with pytest.raises(InputError, match="one whose MLPs are narrower"):
        vitlr.to_dense(narrow).save_pretrained(tmp_path / "narrow")
    model.save_pretrained(tmp_path / "original")  # the dense one is left alone


def test_weights_alone_still_load(tiny_vit, tmp_path):
    save_file(tiny_vit().state_dict(), tmp_path / "w.safetensors")
    read = vitlr.create_model("vit_tiny_patch16_224", checkpoint=tmp_path / "w.safetensors", **TINY)
    assert torch.equal(read(X), tiny_vit()(X))


def test_what_a_file_cannot_rebuild_is_said_before_the_work(batches, caplog):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", **TINY, mlp_ratio=2).eval()  # nothing on it says these widths
    vitlr.compress(model, batches, "params:80%", rank_step=4, method="lowrank", objective="output")
    assert "can be saved with model_args= only: vit_tiny_patch16_224" in caplog.text


def test_a_head_for_other_classes_is_new_and_all_else_is_read(tiny_vit, tmp_path, caplog):
    save_file(tiny_vit().state_dict(), tmp_path / "w.safetensors")
    how = {**TINY, "num_classes": 3}
    with pytest.raises(InputError, match="does not fit"):
        vitlr.create_model("vit_tiny_patch16_224", checkpoint=tmp_path / "w.safetensors", **how)
    read = vitlr.create_model("vit_tiny_patch16_224", checkpoint=tmp_path / "w.safetensors", new_head=True, **how)
    assert read(X).shape == (4, 3) and "head.bias, head.weight is new" in caplog.text
    assert torch.equal(read.blocks[1].mlp.fc1.weight, tiny_vit().blocks[1].mlp.fc1.weight)


def test_features_get_a_head_and_positions_of_another_image_size(tiny_vit, tmp_path, caplog):
    """What fine-tuning a DINOv2 from a file is: it has no classifier, and positions for images of 518 pixels."""
    features = {**tiny_vit(num_classes=0).state_dict()}
    save_file(features, tmp_path / "w.safetensors")
    how = {**TINY, "num_classes": 3, "img_size": 48}
    with pytest.raises(InputError, match="does not fit"):
        vitlr.create_model("vit_tiny_patch16_224", checkpoint=tmp_path / "w.safetensors", **how)
    read = vitlr.create_model("vit_tiny_patch16_224", checkpoint=tmp_path / "w.safetensors", new_head=True, **how)
    assert read(torch.randn(2, 3, 48, 48)).shape == (2, 3)
    assert "head.bias, head.weight is new" in caplog.text and "pos_embed is resampled" in caplog.text
    assert torch.equal(read.blocks[1].mlp.fc1.weight, features["blocks.1.mlp.fc1.weight"])
    assert torch.equal(read.pos_embed[:, 0], features["pos_embed"][:, 0])  # of the class token


def test_a_new_head_takes_no_other_weights_that_do_not_fit(tiny_vit, tmp_path):
    save_file(tiny_vit(embed_dim=48).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="does not fit"):
        vitlr.create_model("vit_tiny_patch16_224", checkpoint=tmp_path / "w.safetensors", new_head=True, **TINY)
