"""Choosing targets by pattern, and what is refused in models of any library, with the reason."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from vitlr.anatomy import linears
from vitlr.errors import InputError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.Linear(8, 8)
        self.body = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.classifier = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))


def test_defaults_patterns_and_order():
    net = Net()
    assert list(linears.targets(net)) == ["body.0", "body.1", "classifier.0"]
    assert linears.kept(net) == {"embeddings": "an embedding", "classifier.1": "the classifier"}
    assert list(linears.targets(net, include="body")) == ["body.0", "body.1"]
    assert list(linears.targets(net, include=["0$"], exclude=[r"^classifier"])) == ["body.0"]
    assert list(linears.targets(net, exclude=r"classifier\.1")) == ["body.0", "body.1", "classifier.0"]
    assert linears.targets(net)["body.1"] is net.body[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": "("}, ["include", "'('", "regular expression"]),
        ({"exclude": ["["]}, ["exclude", "regular expression"]),
        ({"include": "nowhere"}, ["include", "'nowhere'", "matches no compressible linear", "body.0"]),
        ({"include": ["body", "nowhere"]}, ["'nowhere'"]),
        ({"exclude": "nowhere"}, ["exclude", "'nowhere'"]),
        ({"include": "embed"}, ["embeddings", "an embedding"]),
        ({"include": [3]}, ["include", "3 is not a regular expression"]),
        ({"exclude": "."}, ["leave no linear"]),
    ],
)
def test_bad_patterns_are_refused_in_one_line(options, words):
    with pytest.raises(InputError) as refusal:
        linears.targets(Net(), **options)
    message = str(refusal.value)
    assert all(word in message for word in words) and "\n" not in message


def test_models_with_nothing_to_compress_are_refused_with_the_reason():
    with pytest.raises(InputError, match=r"Conv2d has no nn\.Linear"):
        linears.targets(nn.Conv2d(3, 4, 1))
    with pytest.raises(InputError, match=r"attn\.in_proj_weight: MultiheadAttention holds it as a bare parameter"):
        linears.targets(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}))


def test_a_shared_module_appears_once_and_tied_weights_are_hidden():
    shared = nn.Linear(8, 8)
    assert list(linears.targets(nn.Sequential(shared, nn.ReLU(), shared))) == ["0"]
    a, b, c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight
    net = nn.Sequential(a, b, c)
    assert list(linears.targets(net)) == ["2"]
    assert linears.hidden(net)["1"].reason == "its weight is tied: 0.weight = 1.weight"


def test_linears_with_an_unusual_weight_are_hidden():
    class Special(nn.Linear):
        pass

    net = nn.Sequential(
        Special(4, 4),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        torch.nn.utils.spectral_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4),
    )
    assert list(linears.targets(net)) == ["3"]
    reasons = {name: entry.reason for name, entry in linears.hidden(net).items()}
    assert "Special" in reasons["0"] and "Parametrized" in reasons["1"] and "computed" in reasons["2"]


def test_torchvision_vit_hides_its_attention():
    models = pytest.importorskip("torchvision.models")
    model = models.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)
    layer = "encoder.layers.encoder_layer_0"
    assert list(linears.targets(model)) == [f"{layer}.mlp.0", f"{layer}.mlp.3"]
    assert linears.classifier_names(model) == ("heads.head",)
    hidden = linears.hidden(model)
    assert {name: entry.parameters for name, entry in hidden.items()} == {
        f"{layer}.self_attention.in_proj_weight": 3 * 32 * 32,
        f"{layer}.self_attention.out_proj": 32 * 32 + 32,
    }
    text = str(hidden[f"{layer}.self_attention.in_proj_weight"])
    assert "bare parameter" in text and "3,072 parameters" in text


def test_torchvision_swin_hides_its_attention_and_its_targets_fire():
    models = pytest.importorskip("torchvision.models")
    model = models.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4], num_classes=5).eval()
    found, hidden = linears.targets(model), linears.hidden(model)
    assert len(found) == 2 * 2 + 1 and len(hidden) == 2 * 2
    assert all(name.endswith(("attn.qkv", "attn.proj")) for name in hidden)
    seen = set()
    for name, linear in found.items():
        linear.register_forward_hook(lambda *_, name=name: seen.add(name))
    model(torch.randn(1, 3, 32, 32))
    assert seen == set(found)


def test_the_fast_path_of_torch_transformer_layers_is_known():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    assert set(linears.hidden(layer)) == {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"}


def test_open_clip_names_its_packed_projection():
    transformer = pytest.importorskip("open_clip.transformer")
    attention = transformer.Attention(16, num_heads=2)
    assert list(linears.targets(attention)) == ["out_proj"]
    assert linears.hidden(attention)["in_proj_weight"].parameters == 3 * 16 * 16


def test_transformers_models_are_plain():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16
    )
    model = transformers.ViTForImageClassification(config).eval()
    found = linears.targets(model)
    assert len(found) == 6 and linears.classifier_names(model) == ("classifier",)
    seen = set()
    for name, linear in found.items():
        linear.register_forward_hook(lambda *_, name=name: seen.add(name))
    model(torch.randn(1, 3, 32, 32))
    assert seen == set(found)
