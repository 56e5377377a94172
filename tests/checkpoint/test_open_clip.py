"""open_clip's models load alone from their files, which name no more than shapes and switches."""

import pytest
import torch
from torch import nn

import vitlr
from vitlr.checkpoint import origins, other_libraries
from vitlr.data.batches import first_tensor
from vitlr.errors import InputError

open_clip = pytest.importorskip("open_clip")
SMALL = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"vocab_size": 64, "width": 32, "heads": 2, "layers": 1, "context_length": 8}
TOWERS = {
    "as it comes": {},
    "OpenAI's activation": {"quick_gelu": True},
    "scales of layers, a norm after pooling": {"ls_init_value": 0.1, "final_ln_after_pool": True, "pool_type": "avg"},
    "as SigLIP": {
        "act_kwargs": {"approximate": "tanh"},
        "norm_kwargs": {"eps": 1e-6},
        "mlp_ratio": 3.7362,
        "no_ln_pre": True,
    },
    "pooled by attention": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
}


def clip(more, kind="CLIP", **args):
    more = dict(more)
    quick = more.pop("quick_gelu", False)
    torch.manual_seed(0)
    model = getattr(open_clip, kind)(16, {**SMALL, **more}, {**TEXT, **args.pop("text", {})}, quick_gelu=quick, **args)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval()


def images(count=8):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def answer(model, *x):
    return first_tensor(model(*x))


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("method", ["lowrank", "joint"])
def test_a_tower_of_images_loads_alone_and_gives_the_same_bits(kind, method, tmp_path):
    model, x = clip(TOWERS[kind]).visual, images(24)
    small = vitlr.compress(model, x.split(8), "params:80%", method=method, rank_step=2)
    assert not torch.equal(answer(small, x), answer(model, x))
    vitlr.save(small, tmp_path / "m.safetensors")
    loaded = vitlr.load(tmp_path / "m.safetensors")
    assert type(loaded) is type(model) and torch.equal(answer(loaded, x), answer(small, x))
    vitlr.save(loaded, tmp_path / "again.safetensors")
    assert torch.equal(answer(vitlr.load(tmp_path / "again.safetensors"), x), answer(small, x))


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("CLIP", {}),
        ("CLIP", {"init_logit_bias": -10.0, "output_dict": True}),
        ("CustomTextCLIP", {"text": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "pad_id": 1}}),
    ],
)
def test_both_towers_load_alone_and_both_answer_the_same(kind, args, tmp_path):
    model, x, text = clip({}, kind, **args), images(), torch.arange(16).reshape(2, 8)
    small = vitlr.compress(model, [x], "params:90%", method="lowrank", rank_step=2)
    vitlr.save(small, tmp_path / "m.safetensors")
    loaded = vitlr.load(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(x), small.encode_image(x))
        assert torch.equal(loaded.encode_text(text), small.encode_text(text))
        assert not torch.equal(loaded.encode_image(x), model.encode_image(x))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14", "coca_ViT-B-32", "ViT-H-14"])
def test_published_models_are_read_off_as_they_were_made(name):
    config = open_clip.get_model_config(name)
    kind = "CustomTextCLIP" if config.pop("custom_text", False) else "CLIP"
    config.pop("multimodal_cfg", None)
    with torch.device("meta"):
        model = getattr(open_clip, kind)(**config)
    origin = origins.find_origin(model)
    assert origin["library"] == "open_clip" and origin["name"] == kind
    twin = origins.build(origin, "meta")
    assert repr(twin) == repr(model)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


REFUSED = {
    "another class": (lambda name, args: ("SimpleTokenizer", args), "not a model of open_clip"),
    "a model of a hub": (lambda name, args: (name, put(args, "hf_model_name", "someone/model")), "not one that vitlr"),
    "pretrained weights": (lambda name, args: (name, put(args, "timm_model_pretrained", True)), "not one that vitlr"),
    "no table": (lambda name, args: (name, {**args, "vision_cfg": "x"}), "no table"),
    "an address": (lambda name, args: (name, put(args, "pool_type", "http://x/y")), "not a plain value"),
    "an argument nobody knows": (lambda name, args: (name, {**args, "cast_dtype": "x"}), "not one that vitlr"),
}


def put(args, key, value):
    return {**args, "vision_cfg": {**args["vision_cfg"], key: value}}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_file_may_not_ask_for_is_refused(kind):
    change, word = REFUSED[kind]
    name, args = change(*other_libraries.LIBRARIES["open_clip"].find(clip({})))
    with pytest.raises(InputError, match=word):
        origins.check_origin({"library": "open_clip", "name": name, "args": args})


OF_TIMM = {
    "a projection": ("vit_tiny_patch16_224", {"timm_pool": "token", "timm_proj_bias": True, "timm_drop_path": 0.1}),
    "two linears": ("vit_tiny_patch16_224", {"timm_pool": "avg", "timm_proj": "mlp", "timm_drop": 0.1}),
    "a network of convolutions": ("convnext_atto", {"timm_pool": "avg", "patch_dropout": 0.0}),
}


@pytest.mark.parametrize("kind", OF_TIMM)
def test_a_tower_of_timms_loads_alone_and_so_does_the_clip_around_it(kind, tmp_path):
    name, more = OF_TIMM[kind]
    torch.manual_seed(0)
    vision = {"image_size": 224, "timm_model_name": name, **more}
    model = open_clip.CustomTextCLIP(16, vision, TEXT, quick_gelu=True).eval()
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    stats = vitlr.calibrate(model.visual, [x], objective="output", hidden=False)
    plan = vitlr.plan(model.visual, stats, ranks={layer: 4 for layer in list(stats.layers)[:3]})
    small = vitlr.apply(model.visual, plan)
    vitlr.save(small, tmp_path / "m.safetensors")
    assert torch.equal(answer(vitlr.load(tmp_path / "m.safetensors"), x), answer(small, x))
    model.visual = small
    vitlr.save(model, tmp_path / "both.safetensors")
    texts = torch.randint(1, 63, (2, 8), generator=torch.Generator().manual_seed(1))
    loaded = vitlr.load(tmp_path / "both.safetensors")
    assert torch.equal(answer(loaded.visual, x), answer(small, x))
    assert torch.equal(loaded.encode_text(texts), model.encode_text(texts))


@pytest.mark.parametrize("key", ["timm_model_pretrained", "hf_model_name"])
def test_a_file_has_no_weights_fetched_for_a_tower_of_timms(key):
    config = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", key: True}
    origin = {"library": "open_clip", "name": "TimmModel", "args": {"embed_dim": 16, "vision_cfg": config}}
    with pytest.raises(InputError, match=key):
        origins.check_origin(origin)
    named = {"timm_model_name": "hf-hub:someone/something"}
    with pytest.raises(InputError, match="is not a plain value"):
        origins.check_origin({**origin, "args": {"embed_dim": 16, "vision_cfg": named}})
