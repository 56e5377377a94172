"""Which MLPs are recognised, in which library, and what the others are refused for."""

from functools import partial

import pytest
import timm
import torch
from families import MODELS, make
from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from timm.layers.mlp import GlobalResponseNormMlp
from torch import nn

from vitlr.errors import InputError
from vitlr.pruning import find_mlps, read_mlp, refused_mlps


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

    def forward(self, x):
        h = self.act(self.fc1(x))
        return self.fc2(h) + h.sum(-1, keepdim=True)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    ("module", "first", "packed"),
    [
        (Mlp(4, 8, drop=0.1), ("fc1",), False),
        (GluMlp(4, 16), ("fc1",), True),
        (SwiGLUPacked(4, 16), ("fc1",), True),
        (SwiGLU(4, 8), ("fc1_g", "fc1_x"), False),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, 4)), ("0",), False),
        (Functional(), ("gate_proj", "up_proj"), False),
    ],
)
def test_forms(module, first, packed):
    mlp = read_mlp(module)
    assert (set(mlp.first), mlp.packed, mlp.width, mlp.full_width) == (set(first), packed, 8, 8)
    assert mlp.rows(torch.tensor([1, 3])).tolist() == ([1, 3, 9, 11] if packed else [1, 3])


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Mlp(4, 8, norm_layer=nn.LayerNorm), "norm is a LayerNorm over the hidden neurons"),
        (SwiGLU(4, 8, norm_layer=nn.LayerNorm), "norm is a LayerNorm over the hidden neurons"),
        (GlobalResponseNormMlp(4, 8), "grn is a GlobalResponseNorm"),
        (Mlp(4, 8, act_layer=partial(nn.Softmax, -1)), "mixes the hidden neurons"),
        (Mlp(4, 8, act_layer=partial(nn.PReLU, 8)), "has weights of its own"),
        (Shared(), "go through sum"),
        (nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), "what it returns"),
        (nn.Linear(4, 4), "cannot be traced|no linear reads"),
    ],
)
def test_refusals_say_why(module, why):
    with pytest.raises(InputError, match=why):
        read_mlp(module)


@pytest.mark.parametrize("name", MODELS)
def test_families_of_timm(name):
    model, _ = make(name)
    found, refused = find_mlps(model), refused_mlps(model)
    if name == "eva02_base_patch14_224":
        assert not found and len(refused) == 2 and all("LayerNorm" in why for why in refused.values())
        return
    expected = {n for n, m in model.named_modules() if isinstance(m, (Mlp, GluMlp, SwiGLU)) and "meta_mlp" not in n}
    assert expected and found.keys() == expected and not refused


def test_a_table_of_positions_is_no_mlp():
    model = timm.create_model("swinv2_tiny_window8_256", embed_dim=16, depths=(1,), num_heads=(1,), img_size=32)
    assert list(find_mlps(model)) == ["layers.0.blocks.0.mlp"]


def test_convolutions_are_named():
    model = timm.create_model("convnext_tiny", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), conv_mlp=True)
    assert not find_mlps(model)
    assert set(refused_mlps(model).values()) == {"its layers are convolutions, not linears"}


def test_torchvision_open_clip_and_transformers():
    torchvision = pytest.importorskip("torchvision")
    vit = torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 64)
    assert len(find_mlps(vit)) == 2
    open_clip = pytest.importorskip("open_clip")
    tower = open_clip.transformer.VisionTransformer(32, 16, 32, 2, 2, 4.0, output_dim=16)
    assert [m.linears for m in find_mlps(tower).values()] == [
        (f"transformer.resblocks.{i}.mlp.c_fc", f"transformer.resblocks.{i}.mlp.c_proj") for i in range(2)
    ]
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    for kind in ("ViT", "Dinov2", "DeiT", "Dinov2Swiglu"):
        config = getattr(transformers, f"{kind.removesuffix('Swiglu')}Config")(
            **small, image_size=32, **({"use_swiglu_ffn": True} if kind == "Dinov2Swiglu" else {})
        )
        found = find_mlps(getattr(transformers, f"{kind.removesuffix('Swiglu')}Model")(config))
        assert len(found) == 2, kind
        assert all(len(m.first) == (2 if kind == "Dinov2Swiglu" else 1) for m in found.values())
    swin = transformers.SwinModel(transformers.SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[1, 2], image_size=32))
    assert len(find_mlps(swin)) == 2
