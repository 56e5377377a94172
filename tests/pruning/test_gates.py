"""Gates: the same function when put in and taken off, and what they keep when copied, saved and compiled."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from families import MODELS, P14, make
from torch import nn

from vitlr.anatomy.attention import attentions
from vitlr.errors import InputError, NumericalError
from vitlr.measuring.cost import count_params
from vitlr.nn import LowRankLinear, SelectedLinear
from vitlr.pruning.channels import remove_channels
from vitlr.pruning.gates import GatedLinear, add_gates, gates, penalty, remove_gates, scores
from vitlr.pruning.options import KINDS
from vitlr.pruning.sites import layers, params, sites
from vitlr.surgery.fusion import to_dense


def kinds_of(name: str) -> tuple[str, ...]:
    """ConvNeXt has no attention, and EVA02-B a norm over its hidden neurons."""
    return {"convnext_tiny": KINDS[2:], "eva02_base_patch14_224": KINDS[:2]}.get(name, KINDS)


def scatter(model: nn.Module) -> None:
    """Gates that differ, none of them 1."""
    for gate in gates(model).values():
        gate.a.data = torch.rand_like(gate.a) + 0.5


def lose(model: nn.Module) -> dict[str, torch.Tensor]:
    """Set a third of all gates to zero, the heads raggedly; the channels that are left."""
    keep = {}
    for name, gate in gates(model).items():
        left = torch.rand(len(gate.a)) > 0.35
        left[0] = True
        if gate.site.kind == "proj":
            left[: len(left) // 2] = True  # one head stays whole
        gate.a.data[~left] = 0
        keep[name] = left.nonzero().flatten()
    return keep


@pytest.mark.parametrize("name", MODELS)
def test_gates_of_one_change_nothing_and_fold_into_the_weights(name):
    model, images = make(name)
    with torch.no_grad():
        before = model(images)
    gated = add_gates(model, kinds_of(name))
    with torch.no_grad():
        assert (gated(images) - before).abs().max() < 1e-10 * before.abs().max()  # a switched qkv adds its bias later
        scatter(gated)
        changed = gated(images)
        assert (changed - before).abs().max() > 1e-3 * before.abs().max()
        folded = remove_gates(gated)
        assert (folded(images) - changed).abs().max() < 1e-10 * changed.abs().max()
        assert (remove_gates(gated, fold=False)(images) - before).abs().max() < 1e-10 * before.abs().max()
    assert {type(m) for m in folded.modules()} == {type(m) for m in model.modules()}
    assert not gates(folded) and gates(gated)


@pytest.mark.parametrize("name", MODELS)
def test_removal_is_the_masked_model(name):
    model, images = make(name)
    gated = add_gates(model, kinds_of(name))
    found = {key: gate.site for key, gate in gates(gated).items()}
    scatter(gated)
    keep = lose(gated)
    with torch.no_grad():
        masked = gated(images)
        small = remove_channels(remove_gates(gated), found, keep)
        assert (small(images) - masked).abs().max() < 1e-10 * masked.abs().max()
        assert (to_dense(small)(images) - masked).abs().max() < 1e-10 * masked.abs().max()
    around, full = layers(gated, found), {key: site.width for key, site in found.items()}
    left = {key: len(kept) for key, kept in keep.items()}
    before, after = (sum(params(around, found, widths).values()) for widths in (full, left))
    assert count_params(model) - count_params(small) == before - after > 0
    assert not any(isinstance(m, SelectedLinear) for m in to_dense(small).modules())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_alone_removes_what_it_says(kind, tiny_vit, images):
    model, images = tiny_vit().double(), images.double()
    gated = add_gates(model, kind)
    assert [site.site.kind for site in gates(gated).values()] == [kind, kind]
    found = {key: gate.site for key, gate in gates(gated).items()}
    keep = lose(gated)
    with torch.no_grad():
        masked = gated(images)
        small = remove_channels(remove_gates(gated), found, keep)
        assert (small(images) - masked).abs().max() < 1e-10 * masked.abs().max()
    name, kept = next(iter(keep.items()))
    gone = found[name].width - len(kept)
    rows = {"qkv": 96, "proj": 32 + 33, "fc1": 128, "fc2": 32 + 33}[kind]  # v and fc1 lose a bias as well

    def size(m: nn.Module, block: str) -> int:
        return sum(p.numel() for p in m.get_submodule(block).parameters())

    assert size(model, "blocks.0") - size(small, "blocks.0") == gone * rows > 0


def test_low_rank_layers_lose_columns_and_rows_of_their_factors(tiny_vit, images):
    model, images = tiny_vit().double(), images.double()
    for block in model.blocks:
        for parent, child, rank in ((block.attn, "qkv", 6), (block.attn, "proj", 4), (block.mlp, "fc1", 5)):
            setattr(parent, child, LowRankLinear.from_linear(getattr(parent, child), rank))
    gated = add_gates(model)
    found = {key: gate.site for key, gate in gates(gated).items()}
    scatter(gated)
    keep = lose(gated)
    with torch.no_grad():
        masked = gated(images)
        small = remove_channels(remove_gates(gated), found, keep)
        assert (small(images) - masked).abs().max() < 1e-10 * masked.abs().max()
    qkv = small.blocks[0].attn.qkv
    assert isinstance(qkv, SelectedLinear) and isinstance(qkv.linear, LowRankLinear) and qkv.linear.rank == 6
    assert qkv.linear.down.in_features == len(keep["blocks.0.attn.qkv"])
    assert qkv.linear.up.out_features == 64 + len(keep["blocks.0.attn.proj"])


def test_linears_that_read_one_tensor_share_a_gate():
    no_norm = {"scale_mlp": False, "swiglu_align_to": 8}  # a norm would forbid gates before fc2
    model = timm.create_model("eva02_base_patch14_224", **P14, **no_norm)
    gated = add_gates(model)
    attention, mlp = gated.blocks[0].attn, gated.blocks[0].mlp
    assert attention.q_proj.gate is attention.k_proj.gate is attention.v_proj.gate
    assert mlp.fc1_g.gate is mlp.fc1_x.gate and mlp.fc2.gate is not mlp.fc1_g.gate
    twin = copy.deepcopy(gated).blocks[0].attn
    assert twin.q_proj.gate is twin.v_proj.gate and twin.q_proj.gate is not attention.q_proj.gate
    assert sum(p.numel() for p in gated.parameters()) - sum(p.numel() for p in model.parameters()) == sum(
        site.width for site in sites(model).values()
    )


def test_gates_survive_copies_state_and_compiling(tiny_vit, images):
    gated = add_gates(tiny_vit())
    scatter(gated)
    with torch.no_grad():
        expected = gated(images)
        again = add_gates(tiny_vit(seed=5))
        again.load_state_dict(gated.state_dict())
        assert torch.equal(again(images), expected) and torch.equal(copy.deepcopy(gated)(images), expected)
        compiled = torch.compile(gated, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(images), expected, atol=1e-6)
    penalty(gated).backward()
    assert all(torch.equal(gate.a.grad, torch.ones_like(gate.a)) for gate in gates(gated).values())
    assert penalty(gated).item() == pytest.approx(sum(float(s.sum()) for s in scores(gated).values()), rel=1e-5)


def test_the_model_given_stays_as_it_was(tiny_vit):
    model = tiny_vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gated = add_gates(model)
    for gate in gates(gated).values():
        gate.a.data.mul_(3)
    remove_gates(gated)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert add_gates(model, inplace=True) is model and isinstance(model.blocks[0].attn.qkv, GatedLinear)


def test_what_cannot_have_gates_is_named(tiny_vit):
    with pytest.raises(InputError, match="unknown gates 'norm'"):
        add_gates(tiny_vit(), "qkv,norm")
    with pytest.raises(InputError, match="choose some of qkv"):
        add_gates(tiny_vit(), ())
    with pytest.raises(InputError, match="has gates already"):
        add_gates(add_gates(tiny_vit()))
    with pytest.raises(InputError, match=r"encoder\.0\.self_attn: MultiheadAttention is not one that vitlr knows"):
        layer = nn.TransformerEncoderLayer(8, 2, 16)
        layer.self_attn = nn.MultiheadAttention(8, 2, kdim=4)
        add_gates(nn.ModuleDict({"encoder": nn.ModuleList([layer])}), "qkv")
    with pytest.raises(InputError, match=r"Sequential has no attention block to prune\. Supported: timm"):
        add_gates(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)))
    with pytest.raises(InputError, match="a norm over its heads"):
        add_gates(tiny_vit(scale_attn_norm=True))
    with pytest.raises(InputError, match="has hooks"):
        model = tiny_vit()
        model.blocks[1].mlp.fc2.register_forward_hook(lambda *args: None)
        add_gates(model)
    with pytest.raises(InputError, match="has no gates"):
        penalty(tiny_vit())


def test_nan_names_the_layer(tiny_vit):
    gated = add_gates(tiny_vit())
    gates(gated)["blocks.1.mlp.fc1"].a.data[3] = float("nan")
    with pytest.raises(NumericalError, match=r"the gates of blocks\.1\.mlp\.fc1 hold NaN"):
        scores(gated)


def test_channels_that_do_not_fit_are_refused(tiny_vit):
    model = tiny_vit()
    found = sites(model)
    for keep in ([], [3, 2], [0, 32], [-1, 2]):
        with pytest.raises(InputError, match="increasing channel number"):
            remove_channels(model, found, {"blocks.0.attn.qkv": torch.tensor(keep, dtype=torch.int64)})
    with pytest.raises(InputError, match="'nowhere' is no site"):
        remove_channels(model, found, {"nowhere": torch.tensor([1])})
    with pytest.raises(InputError, match="take them off first"):
        remove_channels(add_gates(model), found, {})


@pytest.mark.parametrize("family", ["ViT", "DeiT", "Dinov2"])
def test_attention_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{family}Config")(**sizes, image_size=32, patch_size=8)
    model = getattr(transformers, f"{family}Model")(config).double().eval()
    if not attentions(model)[0]:
        pytest.skip(f"this version of transformers writes {family}'s attention in another way")
    gated, images = add_gates(model), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = {key: gate.site for key, gate in gates(gated).items()}
    assert {site.kind for site in found.values()} == set(KINDS)
    scatter(gated)
    keep = lose(gated)
    with torch.no_grad():
        masked = gated(images)[0]
        small = remove_channels(remove_gates(gated), found, keep)
        assert (small(images)[0] - masked).abs().max() < 1e-10 * masked.abs().max()


def test_attention_of_torchvision():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5).double().eval()
    nn.init.normal_(model.heads.head.weight)  # zero as torchvision makes it
    before = [type(module) for module in model.modules()]
    gated, images = add_gates(model), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert [type(module) for module in model.modules()] == before
    found = {key: gate.site for key, gate in gates(gated).items()}
    assert {site.kind for site in found.values()} == set(KINDS)
    scatter(gated)
    keep = lose(gated)
    with torch.no_grad():
        masked = gated(images)
        whole = remove_gates(gated)
        assert [type(module) for module in whole.modules()] == before
        small = remove_channels(whole, found, keep)
        assert (small(images) - masked).abs().max() < 1e-10 * masked.abs().max()
