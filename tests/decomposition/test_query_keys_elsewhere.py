"""Queries and keys of transformers' and torchvision's attention: rotating is exact, what nothing needs is free."""

import copy

import pytest
import torch
from solved import solved
from torch import nn

import vitlr
from vitlr.anatomy.attention import attentions, score_attentions
from vitlr.anatomy.visibility import visible
from vitlr.data.batches import first_tensor
from vitlr.surgery.attention import narrow_query_keys

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


def make(name):
    torch.manual_seed(0)
    if name == "torchvision's Swin":
        swin = pytest.importorskip("torchvision.models.swin_transformer")
        model = swin.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4], num_classes=5)
    else:
        library = pytest.importorskip("transformers")
        kind, config, args = TRANSFORMERS[name]
        model = getattr(library, kind)(getattr(library, config)(**args))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model.double().eval(), torch.randn(4, 3, 32, 32, dtype=torch.float64)


@torch.no_grad()
def answer(model, x):
    return first_tensor(model(x))


@pytest.mark.parametrize("name", [*TRANSFORMERS, "torchvision's Swin"])
def test_rotating_is_exact_and_directions_that_nothing_needs_are_free(name):
    model, x = make(name)
    with visible(model), torch.no_grad():
        known = score_attentions(model, [n for n, _ in model.named_modules()])
        assert len(known) >= 2 and not attentions(model)[0].keys() - known.keys()
        for attention in known.values():
            linear = model.get_submodule(attention.queries_keys[0])
            rows = torch.arange(attention.width).view(attention.heads, -1)
            linear.weight[rows[:, -1]] = linear.weight[rows[:, 0]]  # the last direction is a copy of the first one
            if linear.bias is not None:
                linear.bias[rows[:, -1]] = linear.bias[rows[:, 0]]
    expected = answer(model, x)
    stats = vitlr.calibrate(model, [x], hidden=True)
    with visible(model):
        spectra = solved(model, stats, "query_keys")
        rotated, cut = copy.deepcopy(model), copy.deepcopy(model)
        assert len(spectra) >= 2
        for spectrum in spectra.values():
            narrow_query_keys(rotated, spectrum, spectrum.full_width)
            narrow_query_keys(cut, spectrum, spectrum.full_width - spectrum.attention.heads)
    for changed in (rotated, cut):
        torch.testing.assert_close(answer(changed, x), expected, rtol=1e-6, atol=1e-6)
