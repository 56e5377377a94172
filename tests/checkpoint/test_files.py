"""A saved file rebuilds its model alone and bit for bit; every other file is refused in one line."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from vitlr.anatomy import linears, visibility
from vitlr.checkpoint import files
from vitlr.checkpoint.creation import create_model
from vitlr.checkpoint.structure import structure
from vitlr.errors import InputError
from vitlr.nn import LowRankLinear
from vitlr.planning.plans import LayerPlan, Plan
from vitlr.surgery import fusion

ROOT = Path(__file__).resolve().parents[2]


def shrink(model: nn.Module, rank: int = 4, step: int = 2) -> nn.Module:
    """Every `step`-th target at low rank with random factors, otherwise as `apply` leaves a model."""
    visibility.make_visible(model)
    for name, linear in list(linears.targets(model).items())[::step]:
        parent, _, child = name.rpartition(".")
        low = LowRankLinear(linear.in_features, linear.out_features, rank, linear.bias is not None)
        setattr(model.get_submodule(parent), child, low)
    return model.eval()


def same(a: nn.Module, b: nn.Module, x: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(a(x), b(x))


def plan_of(model: nn.Module) -> Plan:
    layers = tuple(
        LayerPlan(name, e["in_features"], e["out_features"], e["rank"], 17.0, 0.123456789, "cheapest per parameter")
        for name, e in structure(model).items()
    )
    return Plan("params:40%", "loss", False, 1e-6, layers, "0" * 16, 10, 4, 10, 4, 40, 16)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def saved(tiny_vit, tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    files.save(shrink(tiny_vit()), path)
    return path


def rewrite(path: Path, change) -> Path:
    """Write the file again with a changed header and a digest that fits it, as somebody who means harm would."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["vitlr"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    change(header, tensors)
    if "digest" in header:
        header["digest"] = files._digest(tensors, {k: v for k, v in header.items() if k != "digest"})
    save_file(tensors, path, {"vitlr": json.dumps(header)})
    return path


# what is rebuilt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
def test_logits_are_bit_identical(tiny_vit, tmp_path, x, dtype, fused):
    model = shrink(tiny_vit()).to(dtype)
    if fused:
        model = fusion.fuse(model)
        assert fusion.fused_names(model)
    files.save(model, tmp_path / "m.safetensors")
    loaded = files.load(tmp_path / "m.safetensors")
    assert same(model, loaded, x.to(dtype)) and not loaded.training
    assert structure(loaded) == structure(model)
    assert fusion.fused_names(loaded) == fusion.fused_names(model)
    assert loaded.vitlr_origin == model.vitlr_origin
    assert all(p.requires_grad and p.dtype == dtype for p in loaded.parameters())


FAMILIES = {
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
    "swinv2_tiny_window8_256": {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "eva02_tiny_patch14_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 16},
    "vit_small_patch16_dinov3_qkvb": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "vit_base_patch16_siglip_224": {"depth": 2, "embed_dim": 32, "num_heads": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_tables_that_are_no_part_of_the_state_are_rebuilt(name, dtype, tmp_path, x):
    model = shrink(create_model(name, img_size=32, num_classes=5, **FAMILIES[name])).to(dtype)
    files.save(model, tmp_path / "m.safetensors")
    loaded = files.load(tmp_path / "m.safetensors")
    assert same(model, loaded, x.to(dtype)) and not visibility.bypassed(loaded)


def test_loads_alone_in_a_fresh_process(tiny_vit, tmp_path, x):
    model = shrink(tiny_vit())
    files.save(model, tmp_path / "m.safetensors")
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "logits.pt")
    code = f"""
        import torch
        from vitlr import checkpoint
        x, y = torch.load({str(tmp_path / "logits.pt")!r})
        torch.set_num_threads({torch.get_num_threads()})
        with torch.no_grad():
            print(torch.equal(checkpoint.load({str(tmp_path / "m.safetensors")!r})(x), y))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr


def test_a_model_made_by_timm_itself_is_guessed(tmp_path):
    args = {"num_classes": 7, "in_chans": 1, "img_size": (32, 32), "global_pool": "avg"}
    model = shrink(timm.create_model("vit_tiny_patch16_224", **args))
    files.save(model, tmp_path / "m.safetensors")
    loaded = files.load(tmp_path / "m.safetensors")
    assert same(model, loaded, torch.randn(1, 1, 32, 32))
    assert loaded.vitlr_origin["args"] == args


@pytest.mark.parametrize("args", [{"mlp_ratio": 2}, {"act_layer": "elu"}, {"mlp_ratio": 2, "drop_rate": 0.1}])
def test_what_cannot_be_guessed_is_asked_for(args, tmp_path):
    made = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, **args}
    model = timm.create_model("vit_tiny_patch16_224", **made).eval()
    path = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match="pass model_args="):
        files.save(model, path)
    assert not list(tmp_path.iterdir())
    files.save(model, path, model_args=made)
    assert same(model, files.load(path), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m.blocks[0].mlp, "act", nn.ReLU()), "blocks.0.mlp.act is a"),
        (lambda m: setattr(m.blocks[0].attn, "scale", 1.0), "blocks.0.attn.scale is 1.0"),
        (lambda m: setattr(m.norm, "eps", 1e-3), "norm.eps"),
        (lambda m: m.add_module("extra", nn.Identity()), "module extra is only in the model"),
        (lambda m: m.register_buffer("table", torch.ones(2), persistent=False), "buffer table is only in the model"),
        (lambda m: setattr(m, "head", nn.Sequential(nn.Linear(32, 6))), "head"),
    ],
)
def test_a_model_changed_by_hand_is_not_saved_as_another(tiny_vit, tmp_path, change, words):
    model = tiny_vit()
    change(model)
    with pytest.raises(InputError, match="does not rebuild this model") as refusal:
        files.save(model, tmp_path / "m.safetensors")
    assert words in str(refusal.value) and not list(tmp_path.iterdir())


def test_changed_tables_are_noticed(tmp_path):
    model = create_model("swin_tiny_patch4_window7_224", img_size=32, **FAMILIES["swin_tiny_patch4_window7_224"])
    model.layers[0].blocks[0].attn.relative_position_index += 1
    with pytest.raises(InputError, match="relative_position_index has other values"):
        files.save(model, tmp_path / "m.safetensors")


def test_nobodys_model_needs_its_dense_one(tmp_path):
    def make(width=16):
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 3))

    model, x, path = shrink(make(), 2), torch.randn(4, 8), tmp_path / "m.safetensors"
    files.save(model, path)
    with pytest.raises(InputError, match=r"load\(path, model="):
        files.load(path)
    dense = make()
    before = copy.deepcopy(dense.state_dict())
    assert same(model, files.load(path, model=dense), x)
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())  # the one given is left alone
    with pytest.raises(InputError, match="layer 0: expected"):
        files.load(path, model=make(12))


@pytest.mark.parametrize("name", FAMILIES)
def test_without_an_origin_tables_take_the_dtype_they_were_saved_with(name, tmp_path, x):
    def dense() -> nn.Module:
        return create_model(name, img_size=32, num_classes=5, **FAMILIES[name])

    model = shrink(dense()).to(torch.bfloat16)
    files.save(model, tmp_path / "m.safetensors", model_args=False)
    assert same(model, files.load(tmp_path / "m.safetensors", model=dense()), x.to(torch.bfloat16))


def test_model_args_false_stores_no_origin(tiny_vit, tmp_path, x):
    model = tiny_vit()
    model.blocks[0].mlp.act = nn.ReLU()
    files.save(model, tmp_path / "m.safetensors", model_args=False)
    dense = tiny_vit(seed=1)
    dense.blocks[0].mlp.act = nn.ReLU()
    assert same(model, files.load(tmp_path / "m.safetensors", model=dense), x)


def test_tied_and_shared_tensors_stay_tied(tmp_path):
    def make():
        net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))
        net[1].weight = net[0].weight
        base = torch.randn(2, 3)
        net.register_buffer("a", base[0])
        net.register_buffer("b", base[1])
        return net.eval()

    net = make()
    files.save(net, tmp_path / "m.safetensors")
    loaded = files.load(tmp_path / "m.safetensors", model=make())
    assert loaded[0].weight is loaded[1].weight and torch.equal(net[0].weight, loaded[0].weight)
    assert torch.equal(loaded.b, net.b) and same(net, loaded, torch.randn(2, 6))


# what is kept beside the weights


def test_plan_recipe_metrics_and_data_config_come_back(tiny_vit, tmp_path):
    model = shrink(tiny_vit())
    model.pretrained_cfg["crop_pct"] = 0.77
    plan, path = plan_of(model), tmp_path / "m.safetensors"
    files.save(model, path, plan=plan, recipe={"rungs": ["none"]}, metrics={"top1": 12.5})
    loaded = files.load(path)
    info = loaded.vitlr_info
    assert Plan.from_dict(info["plan"]) == plan
    assert info["recipe"] == {"rungs": ["none"]} and info["metrics"] == {"top1": 12.5} and info["dtype"] == "float32"
    assert timm.data.resolve_model_data_config(loaded) == timm.data.resolve_model_data_config(model)
    files.save(loaded, path)  # saved again: the plan stays, metrics must be measured again
    again = files.load(path).vitlr_info
    assert again["plan"] == info["plan"] and again["metrics"] is None


def test_metrics_that_are_not_json_are_refused(tiny_vit, tmp_path):
    with pytest.raises(InputError, match="plain JSON"):
        files.save(tiny_vit(), tmp_path / "m.safetensors", metrics={"top1": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_the_file_is_as_large_as_its_parameters(tmp_path):
    model = shrink(create_model("vit_small_patch16_224"), 96, step=1)  # the longest header: every layer at low rank
    path = tmp_path / "m.safetensors"
    files.save(model, path, plan=plan_of(model), metrics={"top1": 1.0})
    assert path.stat().st_size <= sum(p.nbytes for p in model.parameters()) + 64 * 1024


def test_the_random_state_is_left_alone(tiny_vit, tmp_path):
    model = shrink(tiny_vit())
    state = torch.get_rng_state()
    files.save(model, tmp_path / "m.safetensors")
    files.load(tmp_path / "m.safetensors")
    assert torch.equal(state, torch.get_rng_state())


# what is refused


def refused(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as refusal:
        files.load(path)
    message = str(refusal.value)
    assert str(path) in message and "\n" not in message and len(message) < 1000, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_cut_short(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    refused(saved)


def test_missing_and_foreign(tmp_path):
    refused(tmp_path / "nowhere.safetensors", "no such file")
    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    refused(tmp_path / "foreign.safetensors", "not written by vitlr")


def test_a_flipped_byte_is_noticed(saved):
    content = bytearray(saved.read_bytes())
    content[-100] ^= 1
    saved.write_bytes(content)
    refused(saved, "digest")


def test_a_changed_tensor_or_header_is_noticed_without_a_new_digest(saved):
    with safe_open(saved, framework="pt") as file:
        text = file.metadata()["vitlr"]
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(tensors, saved, {"vitlr": text.replace('"recipe":null', '"recipe":"labels"')})
    refused(saved, "digest")


def put(key, value):
    return lambda header, tensors: header.__setitem__(key, value)


def put_arg(key, value):
    return lambda header, tensors: header["origin"]["args"].__setitem__(key, value)


def put_rank(value):
    return lambda header, tensors: next(iter(header["structure"].values())).__setitem__("rank", value)


TAMPERED = {
    "newer schema": (put("schema", 99), "upgrade"),
    "other kind": (put("kind", "statistics"), "statistics"),
    "no digest": (lambda header, tensors: header.pop("digest"), "digest"),
    "unknown model": (lambda h, t: h["origin"].__setitem__("name", "os.system"), "not a model"),
    "a path for a name": (lambda h, t: h["origin"].__setitem__("name", "local-dir:/tmp"), "not a model"),
    "a hub name": (lambda h, t: h["origin"].__setitem__("name", "hf-hub:timm/resnet18"), "not a model"),
    "a name that is no text": (lambda h, t: h["origin"].__setitem__("name", ["vit"]), "not a model"),
    "another library": (lambda h, t: h["origin"].__setitem__("library", "os"), "origin"),
    "another model": (lambda h, t: h["origin"].__setitem__("name", "resnet18"), "resnet18("),
    "pretrained": (put_arg("pretrained", True), "'pretrained'"),
    "a file to read": (put_arg("checkpoint_path", "/etc/passwd"), "'checkpoint_path'"),
    "a config with an address": (put_arg("pretrained_cfg", {"url": "http://x"}), "'pretrained_cfg'"),
    "a nested argument": (put_arg("depth", {"a": 1}), "not a plain value"),
    "a huge width": (put_arg("embed_dim", 900_000), "tensor"),
    "an endless depth": (put_arg("depth", 999_999), "does not fit a file of"),
    "endless depths": (put_arg("depths", [999_999, 1]), "does not fit a file of"),
    "no int": (put_arg("depth", "many"), "depth"),
    "a huge number": (put_arg("num_classes", 10**12), "not a plain value in range"),
    "a huge class count": (put_arg("num_classes", 1_000_000), "tensor head"),
    "code for text": (put_arg("global_pool", "__import__('os')"), "not a plain value"),
    "rank 0": (put_rank(0), "rank 0"),
    "rank beyond the matrix": (put_rank(10**9), "rank"),
    "rank no int": (put_rank("4"), "rank"),
    "rank true": (put_rank(True), "rank"),
    "another rank": (put_rank(5), "tensor"),
    "a layer that is none": (put("structure", {"blocks.0": {"rank": 4}}), "blocks.0"),
    "an empty layer": (put("structure", {"blocks.0.mlp.fc2": None}), "blocks.0.mlp.fc2"),
    "no structure": (put("structure", []), "structure"),
    "fuses what is no MLP": (put("fused", ["blocks.0.norm1"]), "fuses 'blocks.0.norm1'"),
    "fuses nothing": (put("fused", ["nowhere"]), "no such module"),
    "fuses itself": (put("fused", [""]), "no such module"),
    "names that are no text": (put("fused", [{}]), "header is damaged"),
    "a tie to nothing": (put("tied", {"head.weight": "nowhere"}), "tensor"),
    "a tie of nothing": (put("tied", {"nowhere": "nowhere else"}), "tensor nowhere"),
    "dtypes that are none": (put("buffers", {"a": "object"}), "buffers"),
    "a data config with more": (put("data", {"url": "http://x"}), "data config"),
    "a missing tensor": (lambda header, tensors: tensors.pop("head.weight"), "head.weight"),
    "one tensor more": (lambda header, tensors: tensors.__setitem__("more", torch.ones(1)), "more"),
    "a tensor of another shape": (lambda h, t: t.__setitem__("head.bias", torch.ones(6)), "head.bias"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_files_are_refused_even_with_a_matching_digest(saved, case):
    change, words = TAMPERED[case]
    refused(rewrite(saved, change), words)


def test_huge_json_is_refused(saved):
    with safe_open(saved, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(tensors, saved, {"vitlr": "[" * 200_000})
    refused(saved, "damaged")
    save_file(tensors, saved, {"vitlr": '{"kind":"model","schema":1,"recipe":"' + "x" * 17 * 2**20 + '"}'})
    refused(saved, "refused")


def test_places_that_cannot_be_written(tiny_vit, tmp_path):
    (tmp_path / "file").write_text("here")
    for place in ("nowhere/m.safetensors", "file/m.safetensors", "."):
        with pytest.raises(InputError, match="cannot write"):
            files.save(tiny_vit(), tmp_path / place)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_FSIZE")
def test_a_full_disk_leaves_the_old_file_whole(saved):
    before = saved.read_bytes()
    code = f"""
        import resource
        from vitlr import checkpoint
        from vitlr.errors import RunError
        model = checkpoint.load({str(saved)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        try:
            checkpoint.save(model, {str(saved)!r})
        except RunError as cause:
            print(cause)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "could not write" in done.stdout, done.stderr
    assert saved.read_bytes() == before and len(list(saved.parent.iterdir())) == 1
