"""What fuse gathers beside timm's plain blocks: transformers' attention, rotated queries and keys, MLPs by any name."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import textwrap
from collections import Counter

import pytest
import torch
from fake_kernels import fake_kernel
from families import make
from torch import nn

import vitlr
from vitlr.data.batches import first_tensor
from vitlr.errors import InputError
from vitlr.nn import (
    FusedBiasedAttention,
    FusedProjections,
    FusedRotaryAttention,
    LowRankLinear,
    NamedLowRankMLP,
    fused_projections,
)

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
TRANSFORMERS = {
    "ViT": ("ViTModel", "ViTConfig"),
    "DeiT": ("DeiTModel", "DeiTConfig"),
    "Dinov2": ("Dinov2Model", "Dinov2Config"),
    "Dinov2WithRegisters": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
    "ViTMSN": ("ViTMSNModel", "ViTMSNConfig"),
    "IJepa": ("IJepaModel", "IJepaConfig"),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig"),
    "Siglip": ("SiglipVisionModel", "SiglipVisionConfig"),
    "Owlv2": ("Owlv2VisionModel", "Owlv2VisionConfig"),
    "Aimv2": ("Aimv2VisionModel", "Aimv2VisionConfig"),
}
ROTARY = [
    "eva02_base_patch14_224",
    "eva02_tiny_patch14_224",
    "eva_giant_patch14_224",
    "vit_small_patch16_dinov3_qkvb",
    "vit_base_patch16_rope_reg1_gap_256",
]


def halved(model):
    """Every linear of a block at half its rank, in double precision, with biases that matter."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    model = model.double().eval()
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    stats = vitlr.calibrate(model, [x], objective="output", hidden=False)
    ranks = {layer.name: layer.size // 2 for layer in stats.layers.values()}
    return vitlr.apply(model, vitlr.plan(model, stats, ranks=ranks)), x


@torch.no_grad()
def answer(model, x):
    return first_tensor(model(x))


def counted(model):
    return Counter(type(module) for module in model.modules())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_blocks_are_fused_to_the_same_function_and_come_back(name, tmp_path):
    library = pytest.importorskip("transformers")
    kind, config = TRANSFORMERS[name]
    small, x = halved(getattr(library, kind)(getattr(library, config)(**SIZE)))
    before = answer(small, x)
    with fake_kernel("attention") as calls:
        fused = vitlr.fuse(small, fold=False)
        torch.testing.assert_close(answer(fused, x), before, rtol=1e-12, atol=1e-12)
        assert len(calls) == 2
    torch.testing.assert_close(answer(fused, x), before, rtol=1e-12, atol=1e-12)
    assert counted(fused)[FusedProjections] == 2
    assert counted(fused)[NamedLowRankMLP] == (0 if name in ("CLIP", "Owlv2", "Aimv2") else 2)  # QuickGELU, gated
    assert list(fused.state_dict()) == list(small.state_dict())
    back = vitlr.unfuse(fused)
    assert [type(m) for m in back.modules()] == [type(m) for m in small.modules()]
    assert torch.equal(answer(back, x), before)
    vitlr.save(fused, tmp_path / "m.safetensors")
    assert torch.equal(answer(vitlr.load(tmp_path / "m.safetensors"), x), answer(fused, x))


def written(name):
    """What the forward of a class of transformers does, without its docstring and annotations."""
    module, _, cls = name.rpartition(".")
    found = importlib.import_module(module)
    forward = ast.parse(textwrap.dedent(inspect.getsource(getattr(found, cls).forward))).body[0]
    return [ast.unparse(line) for line in forward.body if not isinstance(getattr(line, "value", None), ast.Constant)]


@pytest.mark.parametrize("name", sorted(fused_projections.CLASSES | fused_projections.BARE))
def test_what_is_known_by_name_is_written_as_what_was_tried(name):
    pytest.importorskip("transformers")
    tried = fused_projections.BARE if name in fused_projections.BARE else fused_projections.CLASSES
    tried = [of for of in tried if of.split(".")[2] in ("vit", "clip", "siglip", "owlv2", "yolos", "videomae")]
    try:
        forward = written(name)
    except ModuleNotFoundError:
        pytest.skip("this version of transformers has no such model")
    assert forward in [written(of) for of in tried]


def test_an_attention_that_gives_its_softmax_back_stays():
    library = pytest.importorskip("transformers")
    model = library.ViTModel(library.ViTConfig(**SIZE, attn_implementation="eager"))
    attention = (
        model.get_submodule("layers.0.attention") if hasattr(model, "layers") else model.encoder.layer[0].attention
    )
    assert "it runs as eager" in FusedProjections.why_not(attention)


def test_models_that_were_asked_for_their_hidden_states_are_fused_and_still_tell_them():
    library = pytest.importorskip("transformers")
    model, x = library.ViTModel(library.ViTConfig(**SIZE)).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x, output_hidden_states=True).hidden_states
        fused = vitlr.fuse(model)
        assert counted(fused)[FusedProjections] == 2
        for each in (fused, vitlr.unfuse(fused)):
            after = each(x, output_hidden_states=True).hidden_states
            torch.testing.assert_close(after, before)
    heard = []
    model.layers[0].attention.register_forward_hook(lambda *_: heard.append(1))
    assert counted(vitlr.fuse(model))[FusedProjections] == 1


def test_masks_are_left_to_torch():
    library = pytest.importorskip("transformers")
    model = library.ViTModel(library.ViTConfig(**SIZE)).eval()
    attention = next(m for m in model.modules() if FusedProjections.why_not(m) is None)
    fused, x = FusedProjections(copy.deepcopy(attention)), torch.randn(2, 7, 32)
    mask = torch.zeros(1, 1, 7, 7).masked_fill_(torch.ones(7, 7).triu(1).bool(), -1e9)
    with fake_kernel("attention") as calls, torch.no_grad():
        torch.testing.assert_close(fused(x, mask)[0], attention(x, mask)[0])
        torch.testing.assert_close(fused(x, is_causal=True)[0], attention(x, is_causal=True)[0])
        assert not calls and fused(x)[1] is None and len(calls) == 1


@pytest.mark.parametrize("name", ROTARY)
def test_rotated_queries_and_keys_are_fused_to_the_same_function_and_come_back(name):
    model, x = make(name)
    stats = vitlr.calibrate(model, [x], objective="output", hidden=False)
    ranks = {layer.name: layer.size // 2 for layer in stats.layers.values() if "blocks.0" in layer.name}
    small = vitlr.apply(model, vitlr.plan(model, stats, ranks=ranks))  # the other block stays dense
    for each in (small, model):
        before = answer(each, x)
        with fake_kernel("attention") as calls:
            fused = vitlr.fuse(each, fold=False)
            torch.testing.assert_close(answer(fused, x), before, rtol=1e-12, atol=1e-12)
            assert len(calls) == 2 and counted(fused)[FusedRotaryAttention] == 2
        assert list(fused.state_dict()) == list(each.state_dict())
        back = vitlr.unfuse(fused)
        assert [type(m) for m in back.modules()] == [type(m) for m in each.modules()]
        assert torch.equal(answer(back, x), before)


class Chain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 8), nn.Identity())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.b(self.act(self.a(x)))


def test_an_mlp_by_any_name_is_one_operation_and_no_other_forward_is():
    torch.manual_seed(0)
    chain, x = Chain(), torch.randn(3, 8)
    assert NamedLowRankMLP.why_not(chain) == "none of its children is low-rank"
    chain[0] = LowRankLinear.from_linear(chain[0], 4)
    fused = NamedLowRankMLP(copy.deepcopy(chain))
    with fake_kernel("lowrank_mlp") as calls, torch.no_grad():
        torch.testing.assert_close(fused(x), chain(x))
        assert len(calls) == 1
    assert list(fused.state_dict()) == list(chain.state_dict()) and type(fused.back()) is Chain
    other = Residual()
    other.a = LowRankLinear.from_linear(other.a, 4)
    assert "more than" in NamedLowRankMLP.why_not(other)
    chain[2] = nn.Dropout(0.1)
    assert "more than" in NamedLowRankMLP.why_not(chain)


BIASES = ("bias_table", "attention_biases", "rel_pos_", "meta_mlp", "cpb_mlp", "position_bias_mlp")
BIASED = {
    "timm": ["Swin", "SwinV2", "SwinV2, CR", "BEiT", "BEiTv2", "SAM", "TinyViT", "MaxViT", "MViTv2"],
    "transformers": ["Swin", "SwinV2", "BEiT", "Data2Vec, biases", "SAM"],
}


@pytest.mark.parametrize("family", [f"{library}/{name}" for library, names in BIASED.items() for name in names])
@pytest.mark.parametrize("low", [True, False])
def test_attention_under_a_bias_of_positions_is_fused_to_the_same_function_and_comes_back(family, low):
    pytest.importorskip(family.partition("/")[0])
    known = pytest.importorskip("bench.families").families()[family]
    torch.manual_seed(0)
    model = known.make()
    for parameter in model.parameters():  # biases of positions that matter
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    for name, parameter in model.named_parameters():
        if any(
            part in name
            for part in ("bias_table", "attention_biases", "rel_pos_", "meta_mlp", "cpb_mlp", "position_bias_mlp")
        ):
            nn.init.normal_(parameter)
    model, x = model.double().eval(), torch.randn(3, *known.shape, dtype=torch.float64)
    if low:
        stats = vitlr.calibrate(model, [x], objective="output", hidden=False)
        ranks = {layer.name: layer.size // 2 for layer in stats.layers.values()}
        model = vitlr.apply(model, vitlr.plan(model, stats, ranks=ranks))
    before = answer(model, x)
    heads = [module for module in model.modules() if FusedBiasedAttention.why_not(module) is None]
    with fake_kernel("attention") as calls:
        fused = vitlr.fuse(model, fold=False)
        torch.testing.assert_close(answer(fused, x), before, rtol=1e-10, atol=1e-10)
        assert len(calls) == len(heads) > 0 and counted(fused)[FusedBiasedAttention] == len(heads)
        assert all(call[3] is not None for call in calls)
    torch.testing.assert_close(answer(fused, x), before, rtol=1e-10, atol=1e-10)
    assert list(fused.state_dict()) == list(model.state_dict())
    back = vitlr.unfuse(fused)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(answer(back, x), before)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("SegFormer", FusedBiasedAttention),
        ("YOLOS", FusedProjections),
        ("VideoMAE", FusedProjections),
        ("DINOv3", FusedProjections),
    ],
)
def test_attention_of_reduced_keys_turned_or_without_its_last_linear_is_fused_too(family, kind):
    pytest.importorskip("transformers")
    known = pytest.importorskip("bench.families").families()[f"transformers/{family}"]
    torch.manual_seed(0)
    model = known.make()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else max(parameter[0].numel(), 1) ** -0.5)
    model, x = model.double().eval(), torch.randn(3, *known.shape, dtype=torch.float64)
    before = answer(model, x)
    with fake_kernel("attention") as calls:
        fused = vitlr.fuse(model, fold=False)
        torch.testing.assert_close(answer(fused, x), before, rtol=1e-10, atol=1e-10)
        assert len(calls) == counted(fused)[kind] > 0
    torch.testing.assert_close(answer(fused, x), before, rtol=1e-10, atol=1e-10)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert torch.equal(answer(vitlr.unfuse(fused), x), before)


def test_softmax_that_is_asked_for_or_dropped_out_stays_and_masks_hide():
    library = pytest.importorskip("transformers")
    from transformers.models.segformer.modeling_segformer import SegformerAttention
    from transformers.models.swinv2.modeling_swinv2 import Swinv2SelfAttention

    config = library.Swinv2Config(attention_probs_dropout_prob=0.1)
    assert "drops out" in FusedBiasedAttention.why_not(Swinv2SelfAttention(config, 16, 2, 4))
    fused = FusedBiasedAttention(Swinv2SelfAttention(library.Swinv2Config(), 16, 2, 4))
    with pytest.raises(InputError, match=r"no softmax back; run vitlr\.unfuse"):
        fused(torch.randn(2, 16, 16), None, True)
    attention = library.SegformerModel(
        library.SegformerConfig(hidden_sizes=[16] * 4, num_attention_heads=[2] * 4)
    ).eval()
    attention = [module for module in attention.modules() if isinstance(module, SegformerAttention)][-1]
    fused, x = FusedBiasedAttention(copy.deepcopy(attention)), torch.randn(2, 9, 16)
    seen = torch.ones(9, 9).tril().bool()[None, None]
    with torch.no_grad():
        for mask in (seen, torch.zeros(1, 1, 9, 9).masked_fill(~seen, -1e9)):
            torch.testing.assert_close(fused(x, 3, 3, mask)[0], attention(x, 3, 3, mask)[0])
