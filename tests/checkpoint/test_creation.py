"""Making models by name, and reading weights from files that may be anything."""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vitlr
from vitlr.checkpoint.creation import create_model, origin
from vitlr.checkpoint.weight_files import state_dicts
from vitlr.checkpoint.weights import load_weights
from vitlr.errors import InputError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
NAME = "vit_tiny_patch16_224"


def test_remembers_how_it_was_made():
    model = create_model(NAME, cache_dir="elsewhere", drop_rate=None, **TINY)
    assert origin(model) == {"library": "timm", "name": NAME, "args": TINY}
    assert origin(copy.deepcopy(model)) == origin(model)
    assert not any(module.training for module in model.modules())
    assert origin(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", ["vit_tiny_patch16_225", "vit_tinny_patch16_224"])
def test_unknown_name_shows_close_ones(name):
    with pytest.raises(InputError, match=f"unknown model '{name}'.*{NAME}"):
        create_model(name)


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "models/vit.safetensors", "C:\\vit"])
def test_paths_are_no_names(name):
    with pytest.raises(InputError, match="expected a timm name"):
        create_model(name)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"wings": 2}, "wings"),
        ({"embed_dim": 31}, "divisible"),
        ({"checkpoint_path": "x"}, "checkpoint="),
    ],
)
def test_arguments_the_model_does_not_take(args, said):
    with pytest.raises(InputError, match=said) as caught:
        create_model(NAME, **{**TINY, **args})
    assert "\n" not in str(caught.value)


def test_unknown_pretrained_tag():
    with pytest.raises(InputError, match="nobodys_tag"):
        create_model(f"{NAME}.nobodys_tag")


@pytest.mark.parametrize("wrapper", ["none", "safetensors", "model", "state_dict", "ema", "ddp", "safetensors_as_pth"])
def test_checkpoint_gives_the_same_weights(tiny_vit, tmp_path, wrapper):
    state = tiny_vit(seed=3).state_dict()
    path = tmp_path / ("w.safetensors" if wrapper == "safetensors" else "w.pth")
    content = {
        "model": {"model": state, "args": argparse.Namespace(lr=0.1)},
        "state_dict": {"state_dict": state, "epoch": 3},
        "ema": {"state_dict": tiny_vit(seed=4).state_dict(), "state_dict_ema": state},
        "ddp": {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}},
    }.get(wrapper, state)
    save_file(state, path) if wrapper.startswith("safetensors") else torch.save(content, path)
    loaded = create_model(NAME, checkpoint=path, **TINY).state_dict()
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "content",
    [
        lambda state: {"net": state, "acc": 91.2, "epoch": 3},
        lambda state: {"network": {f"vit.{name}": t for name, t in state.items()}, "loss": torch.tensor(0.3)},
        lambda state: {"ema": {"module": state, "updates": torch.tensor(7)}, "optimizer": {"state": {0: dict(state)}}},
        lambda state: {"student": state, "teacher": {"backbone.cls_token": torch.zeros(1, 1, 8)}},
        lambda state: {"a": state, "b": dict(state)},  # the same weights twice
        lambda state: {**state, "epoch": 3},
        lambda state: {
            "state_dict": {**{f"target_encoder.{k}": t for k, t in state.items()}, "loss.weight": state["norm.bias"]}
        },
    ],
)
def test_the_only_weights_that_fit_are_read_whatever_stands_around_them(tiny_vit, tmp_path, content):
    state = tiny_vit(seed=3).state_dict()
    torch.save(content(state), tmp_path / "w.pth")
    loaded = create_model(NAME, checkpoint=tmp_path / "w.pth", **TINY).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("nested", [True, False])
def test_of_several_weights_that_fit_one_is_named(tiny_vit, tmp_path, nested):
    student, teacher = tiny_vit(seed=3).state_dict(), tiny_vit(seed=4).state_dict()
    both = {"student": student, "teacher": teacher}
    if not nested:
        both = {"state_dict": {f"{who}.vit.{name}": t for who, state in both.items() for name, t in state.items()}}
    path = tmp_path / "w.pth"
    torch.save(both, path)
    with pytest.raises(InputError, match=r"2 state dicts that fit: .*student.*, .*teacher.*checkpoint_key=$"):
        create_model(NAME, checkpoint=path, **TINY)
    read = create_model(NAME, checkpoint=path, checkpoint_key="teacher", **TINY)
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in read.state_dict().items())
    with pytest.raises(InputError, match=r"has no 'ema'; it holds .*student"):
        create_model(NAME, checkpoint=path, checkpoint_key="ema", **TINY)
    with pytest.raises(InputError, match="goes with checkpoint="):
        create_model(NAME, checkpoint_key="ema", **TINY)


def test_an_average_of_timm_is_read_with_a_word_and_another_by_its_key(tiny_vit, tmp_path, caplog):
    trained, average = tiny_vit(seed=3).state_dict(), tiny_vit(seed=4).state_dict()
    torch.save({"state_dict": trained, "state_dict_ema": average}, tmp_path / "w.pth")
    read = create_model(NAME, checkpoint=tmp_path / "w.pth", **TINY)
    assert torch.equal(read.norm.weight, average["norm.weight"]) and torch.equal(read.cls_token, average["cls_token"])
    assert "state_dict_ema is read of" in caplog.text and "another: state_dict" in caplog.text
    read = create_model(NAME, checkpoint=tmp_path / "w.pth", checkpoint_key="state_dict", **TINY)
    assert torch.equal(read.cls_token, trained["cls_token"])


def test_what_does_not_fit_is_said_of_what_comes_nearest(tiny_vit, tmp_path):
    torch.save({"net": tiny_vit(num_classes=7).state_dict(), "loss": {"weight": torch.ones(5)}}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"2 of another shape \(head.weight .*\) \(net of net, loss\); name"):
        create_model(NAME, checkpoint=tmp_path / "w.pth", **TINY)


def test_checkpoint_under_its_authors_names(tmp_path):
    swin = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 5}
    state = create_model("swin_tiny_patch4_window7_224", **swin).state_dict()
    foreign = dict(state)
    foreign["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    path = tmp_path / "swin.safetensors"
    save_file(foreign, path)
    loaded = create_model("swin_tiny_patch4_window7_224", checkpoint=path, **swin).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_checkpoint_that_does_not_fit_changes_nothing(tiny_vit, tmp_path):
    path = tmp_path / "w.safetensors"
    state = dict(tiny_vit(seed=3, num_classes=7).state_dict())
    state["extra.weight"] = state.pop("norm.bias")
    save_file(state, path)
    model = tiny_vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError) as caught:
        load_weights(model, path, name="my_vit")
    message = str(caught.value)
    assert "does not fit my_vit" in message and "\n" not in message
    assert "1 missing (norm.bias)" in message and "1 unexpected (extra.weight)" in message
    assert "2 of another shape (head.weight [7, 32], expected [5, 32]" in message
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_checkpoint_of_another_image_size_is_refused(tiny_vit, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(tiny_vit(img_size=64).state_dict(), path)
    with pytest.raises(InputError, match=r"pos_embed \[1, 65, 32\], expected \[1, 17, 32\]"):
        load_weights(tiny_vit(), path)


class Evil:
    ran: bool = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


class System:
    def __reduce__(self):
        return (os.system, ("touch ran",))


class Options(dict):
    """As Lightning's: a table of its own kind, with attributes."""

    def __init__(self):
        super().__init__(lr=0.1)
        self.name = "tiny"


def test_pickled_code_never_runs(tiny_vit, tmp_path):
    path = tmp_path / "evil.pth"
    for content in ({"state_dict": Evil()}, Evil(), {"net": tiny_vit(seed=3).state_dict(), "callback": Evil()}):
        torch.save(content, path)
        with contextlib.suppress(InputError):
            create_model(NAME, checkpoint=path, **TINY)
        assert not Evil.ran
    torch.save({"state_dict": System()}, path)
    with pytest.raises(InputError, match=r"no pickled code is run.*is blocked"):
        state_dicts(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("whole", [True, False])
def test_objects_beside_the_weights_are_looked_past_and_whole_models_looked_into(tiny_vit, tmp_path, whole):
    model = tiny_vit(seed=3)
    options = {"data": Path("/data"), "cfg": Options(), "when": datetime.date(2020, 1, 1)}
    content = {"model": model} if whole else {"state_dict": model.state_dict()}
    torch.save(content | {"hyper_parameters": options}, tmp_path / "w.ckpt")
    read = create_model(NAME, checkpoint=tmp_path / "w.ckpt", **TINY).state_dict()
    assert all(torch.equal(read[name], t) for name, t in model.state_dict().items())


def test_averages_of_torch_and_adapters_of_lora(tiny_vit, tmp_path):
    model = tiny_vit(seed=3)
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), tmp_path / "swa.pth")  # counts beside module.
    read = create_model(NAME, checkpoint=tmp_path / "swa.pth", **TINY)
    assert torch.equal(read.cls_token, model.cls_token)
    state = {name.replace("qkv.", "qkv.base_layer."): t for name, t in model.state_dict().items()}
    torch.save({**state, "blocks.0.attn.qkv.lora_A.default.weight": torch.ones(4, 32)}, tmp_path / "lora.pth")
    with pytest.raises(InputError, match=r"adapters of LoRA.*merge_and_unload"):
        create_model(NAME, checkpoint=tmp_path / "lora.pth", **TINY)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"\x80\x02garbage", b"PK\x03\x04cut"])
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"w\.pth"):
            state_dicts(path)


def test_truncated_safetensors(tiny_vit, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(tiny_vit().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        state_dicts(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.zeros(2)], {"model": {"a": "b"}}])
def test_torch_files_without_weights(tmp_path, content):
    path = tmp_path / "w.pth"
    torch.save(content, path)
    with pytest.raises(InputError, match="holds no weights"):
        state_dicts(path)


def test_missing_checkpoint_and_folder(tmp_path):
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(InputError, match="cannot read checkpoint"):
            state_dicts(path)


def test_a_vitlr_file_says_how_to_open_it(tmp_path):
    path = tmp_path / "small.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"vitlr": "{}"})
    with pytest.raises(InputError, match=r"vitlr\.load"):
        state_dicts(path)


def test_the_real_checkpoint_fits(shared_data):
    path = shared_data("vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors")
    model = create_model(NAME, checkpoint=path)
    assert sum(p.numel() for p in model.parameters()) == 5_717_416
    assert torch.equal(
        model.state_dict()["blocks.11.mlp.fc2.weight"], state_dicts(path)[""]["blocks.11.mlp.fc2.weight"]
    )


def test_a_new_head_is_made_beside_weights_of_training_scripts_and_none_where_none_is_wanted(tiny_vit, tmp_path):
    trained, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    weights = trained.state_dict()
    torch.save({"state_dict": {f"model.{name}": t for name, t in weights.items()}}, tmp_path / "lightning.ckpt")
    save_file(weights, tmp_path / "plain.safetensors")
    for file in ("lightning.ckpt", "plain.safetensors"):
        make = {"checkpoint": tmp_path / file, **TINY}
        with pytest.raises(InputError, match=r"2 of another shape \(head.weight"):
            create_model(NAME, **{**make, "num_classes": 3})
        read = create_model(NAME, new_head=True, **{**make, "num_classes": 3})
        features = create_model(NAME, **{**make, "num_classes": 0})
        for model in (read, features):
            assert torch.equal(model.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])
        assert read(x).shape == (2, 3)
        assert torch.equal(features(x), trained.forward_head(trained.forward_features(x), pre_logits=True))


def test_dinov2_as_its_authors_train_it(tmp_path):
    sizes = {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2}
    state = create_model("vit_small_patch14_dinov2", **sizes).state_dict()
    chunks = {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", name): t for name, t in state.items()}
    teacher = {f"backbone.{name}": t for name, t in chunks.items()}
    teacher |= {"backbone.mask_token": torch.zeros(1, 32), "dino_head.mlp.0.weight": torch.zeros(8, 32)}
    torch.save({"teacher": teacher}, tmp_path / "teacher_checkpoint.pth")
    read = create_model("vit_small_patch14_dinov2", checkpoint=tmp_path / "teacher_checkpoint.pth", **sizes)
    assert all(torch.equal(t, state[name]) for name, t in read.state_dict().items())


def test_what_is_transformers_is_told_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    names = (
        "cls_token",
        "position_embeddings",
        "patch_embeddings.projection.weight",
        "patch_embeddings.projection.bias",
    )
    save_file({f"vit.embeddings.{name}": torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="holds a model of transformers: make it there"):
        create_model(f"local-dir:{tmp_path}")
    with pytest.raises(InputError, match="names are those of transformers: make the model there"):
        create_model(NAME, checkpoint=tmp_path / "model.safetensors", **TINY)


@pytest.mark.parametrize("model", ["vit.pth", {"cls_token": torch.zeros(1)}, None])
def test_what_is_no_model_is_refused(model, batches):
    for use in (vitlr.compress, vitlr.calibrate):
        with pytest.raises(InputError, match=rf"the model is a {type(model).__name__}, expected a torch\.nn\.Module"):
            use(model, batches, "params:80%") if use is vitlr.compress else use(model, batches)


def test_load_names_what_reads_files_of_torch(tiny_vit, tmp_path):
    torch.save(tiny_vit().state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"a file of torch\.save.*vitlr\.create_model"):
        vitlr.load(tmp_path / "w.pth")


def test_weights_that_are_no_plain_ones_or_of_compressed_layers_name_the_remedy(tiny_vit, batches, tmp_path):
    small = vitlr.compress(tiny_vit(), batches, "params:80%", rank_step=4)
    for content in (small, small.state_dict()):
        torch.save(content, tmp_path / "small.pth")
        with pytest.raises(InputError, match=r"were compressed: write such a model with vitlr\.save"):
            create_model(NAME, checkpoint=tmp_path / "small.pth", **TINY)
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_vit()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    torch.save(model.state_dict(), tmp_path / "int8.pth")
    with pytest.raises(InputError, match="no plain tensor; write the weights before"):
        create_model(NAME, checkpoint=tmp_path / "int8.pth", **TINY)
