"""torchvision's Swin, V1 and V2: its attention in windows is measured and replaced, on the same numbers."""

import copy

import pytest
import torch
from torch import nn

import vitlr
from vitlr.anatomy import linears, visibility
from vitlr.nn import WindowLinears

swin = pytest.importorskip("torchvision.models.swin_transformer")
SIZE, CLASSES = 28, 5  # 7 patches a side: windows of 4 are padded, shifted and masked
PARTS = {
    "V1": {},
    "V2": {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2},
}


def make(version):
    torch.manual_seed(0)
    model = swin.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=CLASSES, **PARTS[version]).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model


def images(count=40):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def answers(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("version", PARTS)
@pytest.mark.parametrize("size", [(7, 9), (8, 8), (4, 4), (3, 12)])
@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (0, 2)])
def test_the_attention_of_linears_is_torchvisions_own(version, size, shift):
    torch.manual_seed(0)
    kind = swin.ShiftedWindowAttention if version == "V1" else swin.ShiftedWindowAttentionV2
    dense = kind(16, [4, 4], list(shift), 2).double().eval()
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.5)
    opened, x = WindowLinears.from_dense(dense), torch.randn(3, *size, 16, dtype=torch.float64)
    torch.testing.assert_close(answers(opened, x), answers(dense, x), rtol=1e-12, atol=1e-12)
    assert opened.to_dense() is dense
    changed = copy.deepcopy(opened)
    changed.proj.weight.data *= 2
    torch.testing.assert_close(answers(changed.to_dense(), x), answers(changed, x), rtol=1e-12, atol=1e-12)


def test_keys_that_got_a_bias_do_not_go_back_into_a_module_that_would_forget_it():
    dense = swin.ShiftedWindowAttentionV2(16, [4, 4], [2, 2], 2)
    opened = WindowLinears.from_dense(dense)
    assert opened.plain
    opened.qkv.bias.data += 1
    assert not opened.plain


@pytest.mark.parametrize("version", PARTS)
def test_all_of_it_is_measured_and_the_model_comes_back_as_it_was(version):
    model, x = make(version), images()
    modules, before = dict(model.named_modules()), answers(model, x)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    stats = vitlr.calibrate(model, x.split(8))
    assert len(stats.layers) == 4 * 4 + 1  # and the reduction between the stages
    assert {key: id(m) for key, m in model.named_modules()} == {key: id(m) for key, m in modules.items()}
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.equal(answers(model, x), before)
    with visibility.visible(model):
        assert not linears.hidden(model)


@pytest.mark.parametrize("version", PARTS)
@pytest.mark.parametrize(
    ("budget", "method"), [("params:70%", "lowrank"), ("params:60%", "joint"), ("bytes:30%", "bits")]
)
def test_it_gets_smaller_and_its_file_gives_the_same_bits(version, budget, method, tmp_path):
    model, x = make(version), images()
    before = answers(model, x)
    options = {} if method == "bits" else {"rank_step": 2}
    small = vitlr.compress(model, x.split(8), budget, method=method, **options)
    assert torch.equal(answers(model, x), before) and not torch.equal(answers(small, x), before)
    assert any(isinstance(module, WindowLinears) for module in small.modules())
    vitlr.save(small, tmp_path / "small.safetensors", model_args=False)
    loaded = vitlr.load(tmp_path / "small.safetensors", model=make(version))
    assert torch.equal(answers(loaded, x), answers(small, x))
    torch.testing.assert_close(answers(vitlr.to_dense(loaded), x), answers(small, x), rtol=1e-3, atol=1e-3)
    assert [str(key) for key in small.state_dict() if "relative" in key] == [
        key for key in model.state_dict() if "relative" in key
    ]


@pytest.mark.parametrize("version", PARTS)
def test_full_ranks_reproduce_it(version):
    model, x = make(version).double(), images(8).double()
    stats = vitlr.calibrate(model, x.split(4))
    ranks = {layer.name: layer.size for layer in stats.layers.values()}
    small = vitlr.apply(model, vitlr.plan(model, stats, ranks=ranks))
    torch.testing.assert_close(answers(small, x), answers(model, x), rtol=1e-6, atol=1e-6)
