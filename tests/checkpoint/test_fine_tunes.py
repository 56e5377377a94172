"""Arguments that fine-tunes are made with are read off the model, so that its file rebuilds it alone."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from torch import nn

import vitlr
from vitlr.anatomy.attention import attentions
from vitlr.checkpoint.origins import build, differences, find_origin
from vitlr.errors import InputError
from vitlr.surgery.attention import narrow_attention

FINE_TUNES = {
    "a drop path": {"drop_path_rate": 0.1},
    "dropout everywhere": {"drop_rate": 0.2, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "pos_drop_rate": 0.3},
    "any size of image": {"dynamic_img_size": True},
    "dropped patches": {"patch_drop_rate": 0.25},
    "no class token": {"global_pool": "avg", "class_token": False},
    "a norm behind the token": {"fc_norm": True},
    "none behind the average": {"global_pool": "avg", "fc_norm": False},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "layer scale": {"init_values": 1e-5},
    "norms": {"qk_norm": True, "pre_norm": True},
    "another size": {"depth": 4, "embed_dim": 96, "num_heads": 6, "patch_size": (32, 32)},
    "another activation": {"act_layer": "gelu_tanh"},
}


@pytest.mark.parametrize("kind", FINE_TUNES)
def test_arguments_of_common_fine_tunes_are_read_off_the_model(kind):
    model = timm.create_model("vit_tiny_patch16_224", **FINE_TUNES[kind])
    origin = find_origin(model)
    assert origin["args"] == FINE_TUNES[kind] and differences(model, build(origin, "cpu")) is None
    model.head = nn.Linear(model.embed_dim, 7)  # num_classes stays 1000
    origin = find_origin(model)
    assert origin["args"]["num_classes"] == 7 and differences(model, build(origin, "cpu")) is None


def test_what_weights_began_as_and_sizes_said_by_the_model_are_no_obstacle():
    for name, args in (
        ("vit_tiny_patch16_224", {"weight_init": "jax"}),
        ("maxvit_rmlp_pico_rw_256", {"img_size": 128}),
    ):
        model = timm.create_model(name, **args)
        assert differences(model, build(find_origin(model), "cpu")) is None


def test_heads_are_read_off_a_model_that_lost_some(tiny_vit, batches, tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    small = vitlr.compress(model, batches, "params:90%", rank_step=4, include=r"mlp\.")
    for attention in attentions(small)[0].values():
        narrow_attention(small, attention, torch.arange(16))
    assert small.blocks[0].attn.num_heads == 2
    vitlr.save(small, tmp_path / "small.safetensors")
    read = vitlr.load(tmp_path / "small.safetensors")
    assert read.vitlr_origin["args"]["num_heads"] == 4 and torch.equal(read(batches[0][0]), small(batches[0][0]))


RATES = {"drop_path_rate": 0.1, "drop_rate": 0.1, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "patch_drop_rate": 0.1}
EQUAL = {
    **{name: {name: rate} for name, rate in RATES.items()},
    "an activation by name": {"act_layer": "gelu"},
    "an activation by class": {"act_layer": nn.GELU},
    "a norm by name": {"norm_layer": "layernorm"},
    "a norm by partial": {"norm_layer": partial(nn.LayerNorm, eps=1e-6)},
    "scales that began elsewhere": {"init_values": 1e-2},
}


@pytest.mark.parametrize("kind", EQUAL)
def test_a_model_that_is_equal_in_eval_mode_is_taken(tiny_vit, batches, tmp_path, kind):
    base = {"init_values": 1e-5} if "init_values" in EQUAL[kind] else {}
    plain, other = tiny_vit(**base), tiny_vit(**EQUAL[kind])
    for one, two in ((plain, other), (other, plain)):
        vitlr.save(vitlr.compress(one, batches, "params:80%", rank_step=4), tmp_path / "f", model_args=False)
        vitlr.load(tmp_path / "f", model=two)


COARSE = partial(nn.LayerNorm, eps=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"act_layer": "gelu_tanh"}, "approximate"), ({"norm_layer": COARSE}, "eps")],
)
def test_one_that_is_not_is_refused(tiny_vit, batches, tmp_path, change, said):
    vitlr.save(vitlr.compress(tiny_vit(), batches, "params:80%", rank_step=4), tmp_path / "f", model_args=False)
    with pytest.raises(InputError, match=f"not the one that was saved: .*{said}"):
        vitlr.load(tmp_path / "f", model=tiny_vit(**change))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_wrappers_are_no_part_of_a_file(batches, tmp_path, wrap):
    made = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **made).eval()
    small = vitlr.compress(wrap(model).eval(), batches, "params:80%", rank_step=4)
    vitlr.save(small, tmp_path / "f")
    for read in (vitlr.load(tmp_path / "f"), vitlr.load(tmp_path / "f", model=wrap(model))):
        assert type(read) is type(model) and torch.equal(read(batches[0][0]), small(batches[0][0]))
    assert vitlr.load(tmp_path / "f").vitlr_info["plan"] is not None


def test_channels_are_read_off_the_layer_that_was_put_there(batches, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    model.patch_embed.proj = nn.Conv2d(1, 32, 8, 8)  # in_chans stays 3
    grey = [(x[:, :1], y) for x, y in batches]
    vitlr.save(small := vitlr.compress(model.eval(), grey, "params:80%", rank_step=4), tmp_path / "f")
    assert torch.equal(vitlr.load(tmp_path / "f")(grey[0][0]), small(grey[0][0]))
