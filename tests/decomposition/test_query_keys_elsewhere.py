"""Queries and keys of attention of every library: rotating is exact, what nothing needs is free."""

import copy

import pytest
import torch
from solved import solved
from torch import nn

import vitlr
from vitlr.anatomy.attention import attentions, measurable, score_attentions, why_no_scores
from vitlr.anatomy.visibility import visible
from vitlr.data.batches import first_tensor
from vitlr.surgery.attention import narrow_attention, narrow_query_keys

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
WINDOWS = {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
TRANSFORMERS = {
    "Dinov2WithRegisters": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", SIZE),
    "ViTMSN": ("ViTMSNModel", "ViTMSNConfig", SIZE),
    "IJepa": ("IJepaModel", "IJepaConfig", SIZE),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig", SIZE),
    "Siglip": ("SiglipVisionModel", "SiglipVisionConfig", SIZE),
    "Owlv2": ("Owlv2VisionModel", "Owlv2VisionConfig", SIZE),
    "Beit": ("BeitModel", "BeitConfig", {**SIZE, "use_relative_position_bias": True}),
    "Swin": ("SwinModel", "SwinConfig", WINDOWS),
}
LEFT = {
    "it takes the largest of several queries",
    "it attends to channels in place of tokens, so each of its queries and keys counts",
}
FIVE = {"num_classes": 5}
SMALL = {**FIVE, "depth": 2, "embed_dim": 32, "num_heads": 2}
WIDE = {**FIVE, "depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64)}
TIMM = {
    "beit_base_patch16_224": ({**SMALL, "img_size": 32}, 32),
    "davit_tiny": ({**WIDE, "num_heads": (1, 2, 3, 4)}, 64),
    "hiera_tiny_224": ({**FIVE, "embed_dim": 16, "stages": (2, 1, 1, 1)}, 224),
    "pvt_v2_b0": ({**FIVE, "depths": (1, 1, 1, 1)}, 64),
    "twins_svt_small": (WIDE, 224),
    "cait_xxs24_224": ({**SMALL, "img_size": 32}, 32),
}
TURNED = {
    "eva02_tiny_patch14_224": ({**SMALL, "img_size": 28}, 28),
    "eva_giant_patch14_224": ({**SMALL, "img_size": 28}, 28),
    "vit_base_patch16_rope_reg1_gap_256": ({**SMALL, "img_size": 32}, 32),
    "vit_small_patch16_dinov3_qkvb": ({**SMALL, "img_size": 32}, 32),
    "DINOv3": (SIZE, 32),
}


def of_timm(name, args, pixels):
    torch.manual_seed(0)
    if name == "DINOv3":
        library = pytest.importorskip("transformers")
        model = library.DINOv3ViTModel(library.DINOv3ViTConfig(**{**args, "patch_size": 8}))
    else:
        model = vitlr.create_model(name, **args)
    return with_weights(model), torch.randn(4, 3, pixels, pixels, dtype=torch.float64)


def make(name):
    if name in TIMM:
        return of_timm(name, *TIMM[name])
    torch.manual_seed(0)
    if name == "torchvision's Swin":
        swin = pytest.importorskip("torchvision.models.swin_transformer")
        model = swin.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4], num_classes=5)
    else:
        library = pytest.importorskip("transformers")
        kind, config, args = TRANSFORMERS[name]
        model = getattr(library, kind)(getattr(library, config)(**args))
    return with_weights(model), torch.randn(4, 3, 32, 32, dtype=torch.float64)


def with_weights(model):
    for parameter in model.parameters():
        nn.init.normal_(
            parameter, std=0.5 if parameter.ndim == 1 or not parameter.numel() else parameter[0].numel() ** -0.5
        )
    return model.double().eval()


@torch.no_grad()
def answer(model, x):
    return first_tensor(model(x))


@pytest.mark.parametrize("name", [*TRANSFORMERS, "torchvision's Swin", *TIMM])
def test_rotating_is_exact_and_directions_that_nothing_needs_are_free(name):
    model, x = make(name)
    with visible(model), torch.no_grad():
        known = score_attentions(model, [n for n, _ in model.named_modules()])
        assert known
        assert {why for why in why_no_scores(model).values() if "is not one that" not in why} <= LEFT
        assert len(known) == 4 or not name.startswith("cait")  # two that mix their heads, two of the class token alone
        for attention in known.values():
            linear = model.get_submodule(attention.queries_keys[0])
            rows = torch.arange(attention.width).view(attention.heads, -1)
            linear.weight[rows[:, -1]] = linear.weight[rows[:, 0]]  # the last direction is a copy of the first one
            if linear.bias is not None:
                linear.bias[rows[:, -1]] = linear.bias[rows[:, 0]]
            if attention.bias:
                model.get_parameter(attention.bias)[rows[:, -1]] = model.get_parameter(attention.bias)[rows[:, 0]]
    expected = answer(model, x)
    stats = vitlr.calibrate(model, [x], hidden=True)
    with visible(model):
        spectra = solved(model, stats, "query_keys")
        rotated, cut = copy.deepcopy(model), copy.deepcopy(model)
        assert spectra
        for spectrum in spectra.values():
            narrow_query_keys(rotated, spectrum, spectrum.full_width)
            narrow_query_keys(cut, spectrum, spectrum.full_width - spectrum.attention.heads)
    for changed in (rotated, cut):
        torch.testing.assert_close(answer(changed, x), expected, rtol=1e-6, atol=1e-6)


def test_attentions_that_mix_their_heads_lose_none():
    model, _ = make("cait_xxs24_224")
    with visible(model):
        found, refused = measurable(model, [n for n, _ in model.named_modules()])
    mixing = {name for name, module in model.named_modules() if type(module).__name__ == "TalkingHeadAttn"}
    assert len(mixing) == 2 and not mixing & found.keys()
    assert {refused[name] for name in mixing} == {"it mixes its heads, so none of them stands alone"}


def partner(channel, attention):
    """The other channel of its plane, counted otherwise than by the attention."""
    d = attention.head_dim
    return channel ^ 1 if attention.turned == "pairs" else (channel + d // 2) % d


@pytest.mark.parametrize("name", TURNED)
def test_of_turned_queries_and_keys_whole_planes_go_and_cost_what_is_said(name):
    """Zero by hand is what the narrower linears compute; the scores of the planes that stay are those they were."""
    model, x = of_timm(name, *TURNED[name])
    stats = vitlr.calibrate(model, [x], hidden=True)
    dead = next(layer for layer in stats.layers.values() if layer.score_gradient is not None)
    for key in ("score_gradient", "image_score_moment", "image_score_gradient"):
        getattr(dead, key)[1] = 0  # nothing depends on that head: its planes are the first ones to go
    with visible(model):
        spectra = solved(model, stats, "query_keys")
        assert len(spectra) == 2 and not why_no_scores(model)
        by_hand, cut, whole = (copy.deepcopy(model) for _ in range(3))
        for spectrum in spectra.values():
            attention = spectrum.attention
            width = attention.width // 2 + 2
            assert all(w % 2 == 0 for w in spectrum.choices(3)) and sum(spectrum.ranks(width)) == width
            assert torch.equal(attention.planes.flatten().sort().values, torch.arange(attention.head_dim))
            kept = spectrum.places(width).tolist()
            for channel in kept:
                head, own = divmod(channel, attention.head_dim)
                assert head * attention.head_dim + partner(own, attention) in kept
            zero_queries(by_hand, attention, kept)
            narrow_query_keys(cut, spectrum, width)
            narrow_query_keys(whole, spectrum, spectrum.full_width)
    torch.testing.assert_close(answer(whole, x), answer(model, x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(answer(cut, x), answer(by_hand, x), rtol=1e-9, atol=1e-9)
    assert (answer(cut, x) - answer(model, x)).abs().max() > 1e-3


@torch.no_grad()
def zero_queries(model, attention, kept):
    """Queries that are no more than the channels `kept`: no key meets the others."""
    gone = [channel for channel in range(attention.width) if channel not in kept]
    linear = model.get_submodule(attention.queries_keys[0])
    linear.weight[gone] = 0
    if linear.bias is not None:
        linear.bias[gone] = 0
    if attention.bias:
        model.get_parameter(attention.bias)[gone] = 0


def test_planes_go_in_the_order_of_what_they_cost_together():
    """Against all subsets: the first plane to go is the cheapest one, and sums are those of `M * F` over what went."""
    from vitlr.decomposition.query_key_widths import _by_planes

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    M, F, planes = a @ a.mT, b @ b.mT, torch.arange(8).view(2, -1).mT
    energies, P, Q = _by_planes(M, F, planes)
    order = Q.argmax(1).view(-1, 2)
    assert torch.equal(P @ Q, torch.eye(8, dtype=torch.float64)) and set(map(tuple, order.tolist())) == set(
        map(tuple, planes.tolist())
    )
    costs = [float((M * F)[plane][:, plane].sum()) for plane in planes]
    assert order[-1].tolist() == planes[costs.index(min(costs))].tolist()
    assert energies[-2:].sum() == pytest.approx(min(costs))
    assert (energies[::2] == energies[1::2]).all() and (energies.diff() <= 0).all()
    assert energies.sum() >= float((M * F).sum()) * (1 - 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", [*TIMM, *TURNED])
def test_value_channels_that_go_change_nothing_but_what_they_gave(name):
    model, x = of_timm(name, *(TIMM | TURNED)[name])
    with visible(model):
        narrower = copy.deepcopy(model)
        for attention in attentions(model)[0].values():
            keep = torch.arange(attention.width)[1 :: 3 if attention.heads > 1 else 2]
            mask = torch.zeros(attention.width, dtype=x.dtype).index_fill_(0, keep, 1)
            output = model.get_submodule(attention.output)
            output.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask,))
            narrow_attention(narrower, attention, keep)
            value = narrower.get_submodule(attention.value)
            assert value.linear.out_features == attention.rows(keep)[attention.value].numel() < value.out_features
        torch.testing.assert_close(answer(narrower, x), answer(model, x), rtol=1e-9, atol=1e-9)
