"""Removed neurons are really gone, the others compute what they did, and files, fusion and export know the widths."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from families import arguments, make
from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from torch import nn

import vitlr
from vitlr.checkpoint import files
from vitlr.checkpoint.structure import restructure, structure
from vitlr.errors import InputError
from vitlr.measuring import cost
from vitlr.nn import LowRankLinear, ResidualLowRankLinear
from vitlr.pruning import find_mlps, narrow_mlp, narrowed_mlps, read_mlp
from vitlr.surgery import fusion

FAMILIES = [  # plain, gated in one and in two linears, pooling by attention, stages, channels last
    "vit_tiny_patch16_224", "eva_giant_patch14_224", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_224",
    "swin_tiny_patch4_window7_224", "convnext_tiny",
]  # fmt: skip
FORMS = {
    "mlp": lambda: Mlp(6, 10),
    "no bias": lambda: Mlp(6, 10, bias=False),
    "glu": lambda: GluMlp(6, 20),
    "packed": lambda: SwiGLUPacked(6, 20),
    "swiglu": lambda: SwiGLU(6, 10),
    "sequential": lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)),
}


def masked(mlp: nn.Module, keep: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What the MLP returns with all other neurons set to zero."""
    read = read_mlp(mlp)
    mask = torch.zeros(read.width, dtype=x.dtype)
    mask[keep] = 1
    handle = read.fc2.register_forward_pre_hook(lambda module, args: (args[0] * mask,))
    try:
        return mlp(x)
    finally:
        handle.remove()


def low_rank(mlp: nn.Module, rank: int) -> nn.Module:
    read = read_mlp(mlp)
    for name in (*read.first, read.second):
        setattr(mlp, name, LowRankLinear.from_linear(mlp.get_submodule(name), rank))
    return mlp


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [None, 3])
def test_the_kept_neurons_compute_what_they_did(form, rank):
    mlp, x, keep = FORMS[form]().double().eval(), torch.randn(7, 6, dtype=torch.float64), torch.tensor([8, 1, 4, 5])
    if rank:
        low_rank(mlp, rank)
    expected, last = masked(mlp, keep, x), masked(mlp, keep[[0, 2]], x)
    narrow_mlp(mlp, keep)
    read = read_mlp(mlp)
    assert (read.width, read.full_width) == (4, 10)
    assert torch.allclose(mlp(x), expected, rtol=0, atol=1e-14)
    assert all(m.weight.shape == (m.out_features, m.in_features) for m in mlp.modules() if isinstance(m, nn.Linear))
    narrow_mlp(mlp, torch.tensor([0, 2]))
    assert (read_mlp(mlp).width, read_mlp(mlp).full_width) == (2, 10)
    assert torch.allclose(mlp(x), last, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rank", [None, 3])
def test_new_weights_take_the_place_of_the_columns(rank):
    mlp, keep = Mlp(6, 10).to(torch.bfloat16), torch.tensor([0, 3, 4])
    if rank:
        low_rank(mlp, rank)
    mlp.fc2.requires_grad_(False)
    rows = rank or 6
    weight, bias = torch.randn(rows, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    narrow_mlp(mlp, keep, weight=weight, bias=bias)
    into, out = (mlp.fc2.down, mlp.fc2.up) if rank else (mlp.fc2, mlp.fc2)
    assert torch.equal(into.weight, weight.bfloat16()) and torch.equal(out.bias, bias.bfloat16())
    assert not into.weight.requires_grad and not out.bias.requires_grad
    first = mlp.fc1.up if rank else mlp.fc1
    assert first.weight.requires_grad


def test_a_rank_that_no_longer_fits_is_multiplied_out():
    mlp, x, keep = low_rank(Mlp(6, 10).double(), 5), torch.randn(4, 6, dtype=torch.float64), torch.tensor([1, 7])
    expected = masked(mlp, keep, x)
    narrow_mlp(mlp, keep)
    assert type(mlp.fc1) is nn.Linear and type(mlp.fc2) is nn.Linear
    assert torch.allclose(mlp(x), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"keep": torch.tensor([], dtype=torch.int64)}, "at least one index"),
        ({"keep": torch.tensor([0.0])}, "at least one index"),
        ({"keep": torch.tensor([0, 10])}, "0 to 9"),
        ({"keep": torch.tensor([-1])}, "0 to 9"),
        ({"keep": torch.tensor([1, 1])}, "at most once"),
        ({"keep": torch.tensor([1]), "weight": torch.ones(6, 2)}, r"weight is \[6, 2\], expected \[6, 1\]"),
        ({"keep": torch.tensor([1]), "bias": torch.ones(5)}, r"bias is \[5\]"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(arguments, said):
    mlp = Mlp(6, 10)
    before = copy.deepcopy(mlp.state_dict())
    with pytest.raises(InputError, match=said):
        narrow_mlp(mlp, **arguments)
    assert all(torch.equal(before[key], value) for key, value in mlp.state_dict().items())


def test_residuals_are_refused():
    mlp = Mlp(6, 10)
    mlp.fc2 = ResidualLowRankLinear.from_linear(mlp.fc2, 2, group_size=2)
    with pytest.raises(InputError, match="remove neurons first"):
        narrow_mlp(mlp, torch.tensor([0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_narrowed_saved_and_loaded(name, tmp_path):
    model, x = make(name)
    before = cost.count_params(model)
    for mlp in find_mlps(model).values():
        narrow_mlp(mlp, torch.arange(mlp.width - 1, 0, -2))
    assert cost.count_params(model) < before
    args, _ = arguments(name)
    files.save(model, tmp_path / "m.safetensors", model_args=args)
    loaded = files.load(tmp_path / "m.safetensors")
    assert torch.equal(model(x), loaded(x)) and structure(loaded) == structure(model)
    assert all(m.width == m.full_width // 2 for m in narrowed_mlps(loaded).values())


@pytest.fixture
def narrow(tiny_vit):
    """Narrowed MLPs, fc1 of the first and fc2 of the second at low rank."""
    model = tiny_vit()
    for index, mlp in enumerate(find_mlps(model).values()):
        narrow_mlp(mlp, torch.arange(index, 128, 3))
    for parent, child in ((model.blocks[0].mlp, "fc1"), (model.blocks[1].mlp, "fc2"), (model.blocks[1].attn, "qkv")):
        setattr(parent, child, LowRankLinear.from_linear(getattr(parent, child), 4))
    return model


def test_loads_alone_in_a_fresh_process(narrow, images, tmp_path):
    model = vitlr.fuse(narrow, fold=False)
    assert {"blocks.0.mlp", "blocks.1.mlp"} <= set(fusion.fused_names(model))
    files.save(model, tmp_path / "m.safetensors")
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "logits.pt")
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


def test_a_model_of_nobodys_loads_into_its_dense_one(tmp_path):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    dense, x = copy.deepcopy(model), torch.randn(4, 8)
    narrow_mlp(read_mlp(model), torch.tensor([2, 9, 3]))
    files.save(model, tmp_path / "m.safetensors")
    assert torch.equal(files.load(tmp_path / "m.safetensors", model=dense)(x), model(x))
    assert dense[0].out_features == 16


def test_fuse_dense_and_export_know_the_width(narrow, images):
    expected = narrow(images)
    fused = vitlr.fuse(narrow, fold=False)
    assert structure(fused) == structure(narrow) == structure(vitlr.unfuse(fused))
    assert torch.equal(fused(images), expected)
    narrow_mlp(find_mlps(fused)["blocks.0.mlp"], torch.arange(8))  # fused modules are narrowed as they are
    assert structure(fused)["blocks.0.mlp"] == {"width": 8}
    assert narrowed_mlps(vitlr.unfuse(fused))["blocks.0.mlp"].full_width == 128
    dense = vitlr.to_dense(narrow)
    assert (
        dense.blocks[1].mlp.fc2.in_features == len(range(1, 128, 3))
        and narrowed_mlps(dense).keys() == narrowed_mlps(narrow).keys()
    )
    assert torch.allclose(dense(images), expected, atol=1e-5)
    program = torch.export.export(narrow.eval(), (images,))
    assert torch.allclose(program.module()(images), narrow(images), atol=1e-5)


@pytest.mark.parametrize("width", [0, 129, -1, 4.0, True, "8", None, 10**12])
def test_widths_out_of_range_are_refused(tiny_vit, width):
    model = tiny_vit()
    with pytest.raises(InputError, match="expected 1 to 128"):
        restructure(model, {"blocks.0.mlp": {"width": width}})
    assert not narrowed_mlps(model)


def test_restructure_refuses_what_is_no_mlp_and_ranks_beyond_the_width(tiny_vit):
    model = tiny_vit()
    for name in ("nothing", "blocks.0.attn", "head", "blocks.0"):
        with pytest.raises(InputError, match=r"no MLP|keeps its width"):
            restructure(model, {name: {"width": 4}})
    low = {"rank": 5, "in_features": 32, "out_features": 4, "bias": True}
    with pytest.raises(InputError, match="expected a rank from 1 to 4"):
        restructure(model, {"blocks.0.mlp": {"width": 4}, "blocks.0.mlp.fc1": low})
    with pytest.raises(InputError, match="expected"):
        restructure(model, {"blocks.0.mlp": {"width": 5}, "blocks.0.mlp.fc1": {**low, "rank": 4}})
    assert not narrowed_mlps(model)
