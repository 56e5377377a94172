"""Arguments that fine-tunes are made with are read off the model, so that its file rebuilds it alone."""

from __future__ import annotations

import pytest
import timm
from torch import nn

from vitlr.checkpoint.origins import build, differences, find_origin

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
}


@pytest.mark.parametrize("kind", FINE_TUNES)
def test_arguments_of_common_fine_tunes_are_read_off_the_model(kind):
    model = timm.create_model("vit_tiny_patch16_224", depth=12, **FINE_TUNES[kind])
    origin = find_origin(model)
    assert origin["args"] == FINE_TUNES[kind] and differences(model, build(origin, "cpu")) is None
    model.head = nn.Linear(192, 7)  # num_classes stays 1000
    origin = find_origin(model)
    assert origin["args"]["num_classes"] == 7 and differences(model, build(origin, "cpu")) is None


def test_what_weights_began_as_and_sizes_said_by_the_model_are_no_obstacle():
    for name, args in (
        ("vit_tiny_patch16_224", {"weight_init": "jax"}),
        ("maxvit_rmlp_pico_rw_256", {"img_size": 128}),
    ):
        model = timm.create_model(name, **args)
        assert differences(model, build(find_origin(model), "cpu")) is None
