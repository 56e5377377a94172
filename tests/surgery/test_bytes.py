"""A model whose linears multiply bytes: by measured ranges, saved and loaded, and refused where it cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from mutations import packed, read
from timm.models.vision_transformer import VisionTransformer

import vitlr
from vitlr.anatomy.mlps import narrowed_mlps
from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint import files
from vitlr.decomposition import byte_steps
from vitlr.errors import InputError
from vitlr.nn import FusedAttention, Int8Linear, Int8MLP, LowRankLinear
from vitlr.runtime.modules import swap
from vitlr.surgery import bytes as surgery
from vitlr.surgery.fusion import fuse, to_dense, unfuse


@pytest.fixture(scope="module")
def images():
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    torch.nn.init.normal_(vit.head.weight, std=0.2)
    return vit.eval()


@pytest.fixture(scope="module")
def stats(model, images):
    return vitlr.calibrate(model, images.split(8), extras=("ranges",))


@torch.no_grad()
def test_every_measured_linear_multiplies_bytes_and_the_answer_stays(model, images, stats):
    small = fuse(model, bits=8, stats=stats)
    assert {n for n, m in small.named_modules() if isinstance(m, Int8Linear)} == set(stats.layers)
    assert isinstance(small.blocks[0].mlp, Int8MLP) and isinstance(small.blocks[0].attn, FusedAttention)
    y = model(images)
    assert (small(images) - y).norm() < 0.06 * (y - y.mean(0)).norm()
    assert not any(isinstance(m, Int8Linear) for m in model.modules())  # a copy was taken


def test_how_far_it_is_is_told_layer_by_layer(model, stats):
    told = []
    fuse(model, bits=8, stats=stats, progress=lambda done, total: told.append((done, total)))
    assert told == [(i + 1, len(stats.layers)) for i in range(len(stats.layers))]


@torch.no_grad()
def test_unfused_it_multiplies_bytes_and_dense_it_does_not(model, images, stats):
    small = fuse(model, bits=8, stats=stats)
    apart = unfuse(small)
    assert not any(isinstance(m, (Int8MLP, FusedAttention)) for m in apart.modules())
    torch.testing.assert_close(apart(images), small(images), rtol=1e-2, atol=1e-2)
    plain = to_dense(small)
    assert all(type(plain.get_submodule(name)) is torch.nn.Linear for name in stats.layers)
    assert (plain(images) - model(images)).norm() < 0.02 * model(images).norm()


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_saved_and_loaded_it_is_the_same(tmp_path, model, images, stats, fused):
    small = fuse(model, bits=8, stats=stats)
    small = small if fused else unfuse(small)
    vitlr.save(small, tmp_path / "small.safetensors", model_args=False)
    again = vitlr.load(tmp_path / "small.safetensors", model=model)
    assert torch.equal(again(images), small(images))
    assert (tmp_path / "small.safetensors").stat().st_size < 0.5 * 4 * sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_layers_of_low_rank_multiply_bytes_by_statistics_of_their_own(tmp_path, model, images):
    small = vitlr.compress(model, images.split(8), "params:60%", objective="output", uniform=True)
    low = {name for name, module in small.named_modules() if isinstance(module, LowRankLinear)}
    stats = vitlr.calibrate(small, images.split(8), objective="output", hidden=False, extras=("ranges",))
    assert {f"{name}.{part}" for name in low for part in ("down", "up")} <= set(stats.layers)
    fast = fuse(small, bits=8, stats=stats)
    assert isinstance(fast.blocks[0].mlp, Int8MLP) and isinstance(fast.blocks[0].attn.qkv, LowRankLinear)
    y = small(images)
    assert (fast(images) - y).norm() < 0.06 * (y - y.mean(0)).norm()
    torch.testing.assert_close(to_dense(fast)(images), to_dense(small)(images), rtol=0.05, atol=0.05)
    vitlr.save(fast, tmp_path / "fast.safetensors", model_args=False)
    assert torch.equal(vitlr.load(tmp_path / "fast.safetensors", model=model)(images), fast(images))


@pytest.fixture(scope="module")
def known():
    """A model that a file names by itself."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    vit = vitlr.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)
    torch.nn.init.normal_(vit.head.weight, std=0.2)
    return vit.eval()


def of_bytes(model, images):
    """The model with all its linears of bytes."""
    stats = vitlr.calibrate(model, images.split(8), objective="output", hidden=False, extras=("ranges",))
    return fuse(model, bits=8, stats=stats)


COMPRESSED = {
    "dense": lambda model, loader: model,
    "low rank": lambda model, loader: vitlr.compress(model, loader, "params:60%", objective="output", uniform=True),
    "narrowed": lambda model, loader: vitlr.compress(model, loader, "params:60%", method="joint"),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("how", COMPRESSED)
def test_its_file_alone_gives_the_same_bits(tmp_path, known, images, how, fused, dtype):
    small = of_bytes(COMPRESSED[how](known, images.split(8)), images)
    assert how != "narrowed" or narrowed_mlps(small)
    small = copy.deepcopy(small if fused else unfuse(small)).to(dtype)
    vitlr.save(small, tmp_path / "small.safetensors")
    again = vitlr.load(tmp_path / "small.safetensors")
    assert torch.equal(again(images.to(dtype)), small(images.to(dtype)))
    assert [type(m) for m in again.modules()] == [type(m) for m in small.modules()]
    vitlr.save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "small.safetensors").read_bytes()


@torch.no_grad()
def test_a_file_may_hold_layers_of_floats_and_of_rounded_weights_beside_those_of_bytes(tmp_path, known, images):
    low = COMPRESSED["low rank"](known, images.split(8)).to(torch.bfloat16)
    ends, qkv = torch.full((16,), 3.0), low.blocks[0].attn.qkv
    qkv.up = Int8Linear.from_weight(qkv.up.weight, qkv.up.bias, -ends, ends, 0 * ends)
    rounded = vitlr.compress(known, images.split(8), "bytes:40%", method="bits")
    for name in ("blocks.1.attn.proj", "blocks.0.mlp.fc1"):
        dense = known.get_submodule(name)
        ends = torch.full((48,), 4.0)
        swap(rounded, name, Int8Linear.from_weight(dense.weight, dense.bias, -ends, ends, 0 * ends))
    for small, dtype in ((low, torch.bfloat16), (rounded, torch.float32)):
        vitlr.save(small, tmp_path / "small.safetensors")
        again = vitlr.load(tmp_path / "small.safetensors")
        assert torch.equal(again(images.to(dtype)), small(images.to(dtype)))


@pytest.mark.parametrize(
    ("part", "wrong", "told"),
    [
        ("scale", lambda t: t.index_fill(0, torch.tensor(3), torch.inf), "scale holds what is not finite"),
        ("shift", lambda t: t.index_fill(0, torch.tensor(3), torch.nan), "shift holds what is not finite"),
        ("bias", lambda t: t / 0, "bias holds what is not finite"),
        ("multiplier", lambda t: -t, r"multiplier reaches -[\d.]+, expected steps above 0"),
        ("scale", lambda t: 0 * t, "scale reaches 0, expected steps above 0"),
        ("scale", lambda t: t.half(), "expected torch.float32|expected one dtype"),
        ("codes", lambda t: t.float(), "codes is torch.float32, expected torch.int8"),
        ("codes", lambda t: t[:, 1:], r"codes: the model has \(48, 192\), the file has \(48, 191\)"),
        ("multiplier", lambda t: t[1:], r"multiplier: the model has \(192,\), the file has \(191,\)"),
    ],
)
def test_a_file_with_steps_that_are_none_is_refused(tmp_path, known, images, part, wrong, told):
    path = tmp_path / "small.safetensors"
    vitlr.save(of_bytes(known, images), path)
    header, tensors = read(path)
    key = f"blocks.1.mlp.fc2.{part}"
    tensors[key] = wrong(tensors[key]).contiguous()
    del header["digest"]
    path.write_bytes(packed({**header, "digest": files._digest(tensors, header)}, tensors))
    with pytest.raises(InputError, match=told):
        vitlr.load(path)


def test_ranges_are_the_extremes_of_all_images_in_any_order(model, images, stats):
    seen = []
    handle = model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    halves = [vitlr.calibrate(model, half.split(4), extras=("ranges",)) for half in images.split(12)]
    for found in (stats, halves[0].merge(halves[1]), halves[1].merge(halves[0])):
        layer = found.layers["blocks.1.mlp.fc2"]
        torch.testing.assert_close(layer.input_low.float(), seen[0].flatten(0, -2).amin(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.input_high.float(), seen[0].flatten(0, -2).amax(0), rtol=1e-5, atol=1e-6)


def spiked(model, images, size):
    """The model with one neuron that is huge for some tokens, and matters; and its statistics."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[1].mlp.fc1.weight[5] *= size
        other.blocks[1].mlp.fc2.weight[:, 5] *= 3
    return other, vitlr.calibrate(other, images.split(8), extras=("ranges",))


@torch.no_grad()
def test_a_neuron_that_is_now_and_then_huge_gets_columns_of_its_own(tmp_path, known, images, monkeypatch):
    huge, stats = spiked(known, images, 30)
    monkeypatch.setattr(surgery, "_SHARE", 1)  # that neuron makes all before it dear too
    small = fuse(huge, bits=8, stats=stats)
    assert {n for n, m in small.named_modules() if isinstance(m, Int8Linear)} == set(stats.layers)
    wide = {name: small.get_submodule(name).wide for name in stats.layers}
    assert wide["blocks.1.mlp.fc2"].tolist() == [5] * 4
    assert sum(len(w) for w in wide.values() if w is not None) < 16  # only where it matters
    vitlr.save(small, tmp_path / "small.safetensors")
    assert torch.equal(vitlr.load(tmp_path / "small.safetensors")(images), small(images))
    monkeypatch.setattr(byte_steps, "_MOST", 0)
    errors = [(f(images) - huge(images)).norm() for f in (small, fuse(huge, bits=8, stats=stats))]
    assert errors[0] < 0.5 * errors[1]


def test_a_layer_that_costs_most_of_all_stays_in_floats(model, images):
    huge, stats = spiked(model, images, 300)
    small = fuse(huge, bits=8, stats=stats)
    floats = [name for name in stats.layers if not isinstance(small.get_submodule(name), Int8Linear)]
    assert floats == ["blocks.1.mlp.fc2"]
    assert torch.equal(small.blocks[1].mlp.fc2.weight, huge.blocks[1].mlp.fc2.weight)


def test_a_neuron_that_slept_has_the_range_of_others():
    low = torch.tensor([-0.17, -0.1, -0.17, -0.17, -0.1]).double()
    high = torch.tensor([3.0, 0.2, 4.0, 3.5, 0.0]).double()
    mean = torch.tensor([0.0, -0.1, 0.1, 0.0, -0.1]).double()
    V = torch.tensor([0.1, 0.01, 0.1, 0.1, 0.5]).double()
    least, most = byte_steps._foreseen(low, high, mean, V)
    assert torch.equal(least[[0, 2, 3]], low[[0, 2, 3]]) and torch.equal(most[[0, 2, 3]], high[[0, 2, 3]])
    width = most - least
    torch.testing.assert_close(width[1], 4.17 * (V[1] / V[2]).sqrt())  # as many deviations as the third has
    torch.testing.assert_close(width[4], width[0])  # the middle one
    assert bool((least >= low.min()).all()) and bool((least <= low).all())


def test_statistics_come_back_from_a_file(tmp_path, stats):
    stats.save(tmp_path / "stats.safetensors")
    again = Statistics.load(tmp_path / "stats.safetensors")
    for name, layer in stats.layers.items():
        assert torch.equal(again.layers[name].input_low, layer.input_low)


def test_what_cannot_be_is_told(model, images, stats):
    with pytest.raises(InputError, match="bits=4: expected 8"):
        fuse(model, bits=4, stats=stats)
    with pytest.raises(InputError, match="bits=8 and stats= go together"):
        fuse(model, bits=8)
    with pytest.raises(InputError, match="bits=8 and stats= go together"):
        fuse(model, stats=stats)
    with pytest.raises(InputError, match="no ranges of inputs: calibrate"):
        fuse(model, bits=8, stats=vitlr.calibrate(model, images.split(8)))
    small = fuse(model, bits=8, stats=stats)
    with pytest.raises(InputError, match="of another model"):
        fuse(small, bits=8, stats=stats)
    torch.manual_seed(1)
    other = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    with pytest.raises(InputError, match="of other weights"):
        fuse(other, bits=8, stats=stats)
