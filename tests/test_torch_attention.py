"""Models built on torch's own attention and encoder layers, from calibration to a file, as torchvision's ViT is."""

import copy

import pytest
import torch
from torch import nn

import vitlr
from vitlr.anatomy import linears, visibility
from vitlr.calibration.loop import calibrate
from vitlr.nn import LowRankLinear, MultiheadLinears

SIZE, WIDTH, CLASSES = 32, 32, 5


def torchvision_vit():
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(SIZE, 8, 2, 2, WIDTH, 64, num_classes=CLASSES)


class Encoder(nn.Module):
    """A hand-written ViT on `nn.TransformerEncoder`."""

    def __init__(self, norm_first=True, batch_first=True):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 64, 0.0, activation="gelu", norm_first=norm_first, batch_first=batch_first
        )
        self.batch_first = batch_first
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images, padding=None):
        tokens = self.patch_embed(images).flatten(2).mT
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        out = self.encoder(tokens, src_key_padding_mask=padding)
        return self.head(out.mean(1 if self.batch_first else 0))


MODELS = {
    "torchvision": torchvision_vit,
    "encoder": Encoder,
    "encoder, norms last, as torch nests it": lambda: Encoder(norm_first=False),
    "encoder, tokens first": lambda: Encoder(batch_first=False),
}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model


def images(count=40):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def answers(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", MODELS)
def test_all_of_an_attention_is_measured_and_the_model_comes_back_as_it_was(name):
    model, x = make(name), images()
    modules, before = dict(model.named_modules()), answers(model, x)
    stats = calibrate(model, x.split(8))
    per_block = {"qkv", "out_proj"}
    assert {layer.rsplit(".", 1)[1] for layer in stats.layers} >= per_block
    assert len(stats.layers) == 2 * 4
    assert {key: id(module) for key, module in model.named_modules()} == {key: id(m) for key, m in modules.items()}
    assert torch.equal(answers(model, x), before)


def test_tokens_before_images_sum_to_what_images_before_tokens_do():
    first, other = make("encoder"), make("encoder, tokens first")
    other.load_state_dict(first.state_dict())
    sums = [vitlr.calibrate(m, images(6).split(3), objective=("fisher", "normalized")).layers for m in (first, other)]
    for name, layer in sums[0].items():
        for key, total in layer.held.items():
            torch.testing.assert_close(sums[1][name].held[key], total, rtol=1e-3, atol=1e-3 * float(total.abs().max()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", ["params:80%", "bytes:30%"])
def test_a_model_of_torchs_attentions_gets_smaller_and_its_file_gives_the_same_bits(name, budget, tmp_path):
    model, x = make(name), images()
    before = answers(model, x)
    small = vitlr.compress(model, x.split(8), budget, **({"rank_step": 1} if "params" in budget else {}))
    assert torch.equal(answers(model, x), before)
    assert any(isinstance(module, MultiheadLinears) for module in small.modules())
    assert not torch.equal(answers(small, x), before)
    vitlr.save(small, tmp_path / "small.safetensors", model_args=False)
    loaded = vitlr.load(tmp_path / "small.safetensors", model=make(name))
    assert torch.equal(answers(loaded, x), answers(small, x))
    assert list(loaded.state_dict()) == list(small.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_to_dense_gives_torchs_modules_back(name):
    model, x = make(name), images()
    small = vitlr.compress(model, x.split(8), "params:60%", method="lowrank", rank_step=1)
    dense = vitlr.to_dense(small)
    assert [type(m) for m in dense.modules()] == [type(m) for m in model.modules()]
    assert dense.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(answers(dense, x), answers(small, x), rtol=1e-4, atol=1e-4)
    nested = [m.use_nested_tensor for m in dense.modules() if isinstance(m, nn.TransformerEncoder)]
    assert nested == [m.use_nested_tensor for m in model.modules() if isinstance(m, nn.TransformerEncoder)]


@pytest.mark.parametrize("name", MODELS)
def test_only_attentions_that_changed_stay_open(name):
    model, x = make(name), images()
    stats = vitlr.calibrate(model, x.split(8))
    wanted = next(layer for layer in stats.layers if layer.endswith("out_proj"))
    small = vitlr.apply(model, vitlr.plan(model, stats, ranks={wanted: 4}))
    opened = [key for key, m in small.named_modules() if isinstance(m, MultiheadLinears)]
    assert len(opened) == 1 and type(small.get_submodule(opened[0]).out_proj) is LowRankLinear
    assert sum(isinstance(m, nn.MultiheadAttention) for m in small.modules()) == 1


def test_the_fast_path_of_an_encoder_layer_does_not_read_past_a_low_rank_layer():
    model, x = make("encoder"), images(4)
    ranks = {f"encoder.layers.{i}.linear1": 4 for i in range(2)}
    small = vitlr.compress(model, images().split(8), ranks=ranks)
    for layer in small.encoder.layers:
        layer.linear1.down.weight.data.zero_()
    changed = answers(small, x)
    for layer in small.encoder.layers:
        layer.linear1.down.weight.data.normal_()
    assert not torch.equal(answers(small, x), changed)


def test_a_padding_mask_that_torch_would_nest_reaches_the_linears():
    model, x = make("encoder, norms last, as torch nests it"), images(4)
    padding = (torch.arange(16) > 9).expand(4, 16)
    with visibility.visible(model):
        opened = answers(lambda t: model(t, padding), x)
    slow = copy.deepcopy(model)
    slow.encoder.use_nested_tensor = False
    torch.testing.assert_close(opened, answers(lambda t: slow(t, padding), x), rtol=1e-4, atol=1e-5)


def test_an_attention_that_somebody_listens_to_stays_as_it_is():
    model, x, heard = make("torchvision"), images(), []
    attention = model.encoder.layers[0].self_attention
    attention.register_forward_hook(lambda *_: heard.append(1))
    small = vitlr.compress(model, x.split(8), "bytes:40%")
    assert type(small.encoder.layers[0].self_attention) is nn.MultiheadAttention
    assert isinstance(small.encoder.layers[1].self_attention, MultiheadLinears)
    heard.clear()
    answers(small, x)
    assert heard


def test_visible_within_visible_puts_back_once():
    model = make("encoder")
    with visibility.visible(model) as outer:
        with visibility.visible(model) as inner:
            assert inner == () and len(outer) == 4
        assert "encoder.layers.0.self_attn.qkv" in linears.survey(model).targets
    assert not linears.survey(model).targets


def test_in_place_the_model_itself_changes_and_plain_attentions_stay_torchs():
    model, x = make("torchvision"), images()
    plan = vitlr.plan(model, vitlr.calibrate(model, x.split(8)), "params:80%")
    small = vitlr.apply(model, plan)
    expected = answers(small, x)
    assert vitlr.apply(model, plan, inplace=True) is model
    assert torch.equal(answers(model, x), expected)
    assert list(model.state_dict()) == list(small.state_dict())


def test_refinement_compares_blocks_with_those_of_the_dense_model():
    model, x = make("torchvision"), images(64)
    small = vitlr.compress(model, x.split(16), "params:60%", method="lowrank", rank_step=1)
    refined = vitlr.refine(small, model, list(x.split(16)), rungs="refit", steps=2)
    assert torch.isfinite(answers(refined, x)).all()
    assert type(model.encoder.layers[0].self_attention) is nn.MultiheadAttention
