"""Files of transformers' and torchvision's models load alone, and what a file names is checked before it is built."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import vitlr
from vitlr.checkpoint import files, other_libraries
from vitlr.checkpoint.creation import remade
from vitlr.data.batches import first_tensor
from vitlr.errors import InputError

VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 64}
STAGES = {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2], "hidden_sizes": [16, 32, 32, 64]}
SWIN = {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
TORCHVISION = {"image_size": 64, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 64, "mlp_dim": 128}
# class: (class of its configuration, what that says)
TRANSFORMERS = {
    "ViTForImageClassification": ("ViTConfig", {**VIT, "num_labels": 10}),
    "Dinov2ForImageClassification": ("Dinov2Config", {**VIT, "patch_size": 16, "num_labels": 10}),
    "SwinForImageClassification": ("SwinConfig", {**SWIN, "num_labels": 10}),
    "SegformerForImageClassification": ("SegformerConfig", {**STAGES, "num_labels": 10}),
    "SiglipForImageClassification": ("SiglipConfig", {"vision_config": VIT, "num_labels": 10}),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", VIT),
}
ALONE = [*TRANSFORMERS, "VisionTransformer"]


def dense(name):
    if name == "VisionTransformer":
        return pytest.importorskip("torchvision.models").VisionTransformer(**TORCHVISION, num_classes=10)
    library = pytest.importorskip("transformers")
    config, args = TRANSFORMERS[name]
    return getattr(library, name)(getattr(library, config)(**args))


def small(name):
    """A compressed model of random weights under which answers depend on the images, and two images."""
    model, x = dense(name).eval(), torch.randn(8, 3, 64, 64)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    stats = vitlr.calibrate(model, [x], objective="loss", hidden=False)
    return vitlr.apply(model, vitlr.plan(model, stats, "params:90%", method="lowrank")), x[:2]


@torch.no_grad()
def answer(model, x):
    return first_tensor(model(x))


@pytest.mark.parametrize("name", ALONE)
def test_a_file_loads_alone_and_gives_the_same_bits(name, tmp_path):
    model, x = small(name)
    vitlr.save(model, tmp_path / "m.safetensors")
    loaded = vitlr.load(tmp_path / "m.safetensors")
    assert type(loaded) is type(model) and torch.equal(answer(loaded, x), answer(model, x))
    assert answer(remade(loaded), x).shape == answer(model, x).shape
    vitlr.save(loaded, tmp_path / "again.safetensors")
    assert torch.equal(answer(vitlr.load(tmp_path / "again.safetensors"), x), answer(model, x))


def test_names_of_classes_come_back():
    transformers = pytest.importorskip("transformers")
    args = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**args, image_size=32, id2label={0: "tench, Tinca tinca", 1: "goldfish"})
    origin = other_libraries.find(transformers.ViTForImageClassification(config))
    assert (
        other_libraries.build(other_libraries.check(json.loads(json.dumps(origin)))).config.id2label == config.id2label
    )


def put(key, value):
    return lambda origin: origin["args"].__setitem__(key, value)


TAMPERED = {
    "another class": (lambda o: o.__setitem__("name", "AutoModel"), "not a model of images"),
    "a model of text": (lambda o: o.__setitem__("name", "BertModel"), "not a model of images"),
    "a function": (lambda o: o.__setitem__("name", "pipeline"), "not a model of images"),
    "a path in a name": (lambda o: o.__setitem__("name", "models.vit.ViTModel"), "not a model of images"),
    "another model's weights": (put("backbone", "resnet50"), "no file may set"),
    "other weights beside it": (put("use_timm_backbone", True), "no file may set"),
    "code of a repository": (put("auto_map", {"AutoModel": "evil.Model"}), "no file may set"),
    "a name to read from": (put("_name_or_path", "/etc"), "no file may set"),
    "a kernel of a repository": (put("attn_implementation", "someone/kernel"), "expected eager or sdpa"),
    "a kernel, nested": (put("vision_config", {"_attn_implementation": "someone/kernel"}), "no file may set"),
    "an address": (put("hidden_act", "http://x/y"), "not a plain value"),
    "endless depth": (put("num_hidden_layers", 900_000), "does not fit a file"),
    "huge width": (put("hidden_size", 900_000), ""),
    "huge images": (put("image_size", 900_000), ""),
    "a million labels": (put("id2label", {str(i): "x" for i in range(100_001)}), ""),
    "labels that are none": (put("id2label", ["a"]), "id2label"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "m.safetensors"
    vitlr.save(small("ViTForImageClassification")[0], path)
    return path


@pytest.mark.parametrize("kind", TAMPERED)
def test_what_a_file_may_not_ask_for_is_refused(kind, saved, tmp_path):
    with safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()["vitlr"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    tamper, word = TAMPERED[kind]
    tamper(header["origin"])
    header["digest"] = files._digest(tensors, {k: v for k, v in header.items() if k != "digest"})
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, {"vitlr": json.dumps(header)})
    with pytest.raises(InputError, match=word):
        vitlr.load(path)


def test_a_folder_of_such_a_model_opens_too(tmp_path):
    model, x = small("ViTForImageClassification")
    vitlr.save_pretrained(model, tmp_path / "folder")
    assert "`ViTForImageClassification` (transformers)" in (tmp_path / "folder" / "README.md").read_text()
    assert torch.equal(answer(vitlr.load(f"local-dir:{tmp_path / 'folder'}"), x), answer(model, x))


def test_new_heads_of_torchvision_are_read_off_also_behind_compression():
    library = pytest.importorskip("torchvision.models")
    vit = library.VisionTransformer(**TORCHVISION, num_classes=10)
    vit.heads.head = nn.Linear(64, 3)  # num_classes stays 10
    assert other_libraries.find(vit)["args"]["num_classes"] == 3
    swin = library.swin_t()
    swin.head = nn.Linear(768, 3)
    swin.features[1][0].mlp[0] = vitlr.LowRankLinear.from_linear(swin.features[1][0].mlp[0], 8)
    assert other_libraries.find(swin) == {"library": "torchvision", "name": "swin_t", "args": {"num_classes": 3}}
