"""MLPs of 1x1 convolutions, and with norms by batch between their linears: neurons go with their channels, exactly."""

import pytest
import torch
from torch import nn

import vitlr
from vitlr.anatomy.mlps import find_mlps, narrower_mlps, refused_mlps
from vitlr.anatomy.visibility import put_back, visible
from vitlr.data.batches import first_tensor
from vitlr.measuring import cost
from vitlr.surgery.mlps import narrow_mlp

LEVIT = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
LEVIT |= {"image_size": 64, "num_labels": 5}
MODELS = {  # (name, arguments, pixels, how many MLPs it has)
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 32, 4),
    "mobilevitv2_050": ({}, 64, 9),
    "levit_128s": ({}, 224, 11),
    "repvit_m0_9": ({}, 64, 36),  # with those that weigh channels
}


def make(name):
    torch.manual_seed(0)
    if name == "LeViT":
        library = pytest.importorskip("transformers")
        model = library.LevitForImageClassification(library.LevitConfig(**LEVIT))
    elif name == "by hand":
        model = InARow()
    else:
        model = vitlr.create_model(name, num_classes=5, **MODELS[name][0])
    for module in model.eval().modules():
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.0)
    pixels = MODELS[name][1] if name in MODELS else 64
    return model, torch.randn(24, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


class InARow(nn.Module):
    """Everything of one kind after the other: norms and a depthwise convolution by themselves and in sequences."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 8, 8)
        self.mlp = nn.Sequential(
            nn.Sequential(nn.Conv2d(12, 32, 1, bias=False), nn.BatchNorm2d(32)),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, groups=32),
            nn.BatchNorm2d(32),
            nn.GELU(),
            nn.Sequential(nn.Conv2d(32, 12, 1), nn.BatchNorm2d(12)),
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.mlp(x)).mean((2, 3)))


COUNTS = {**{name: count for name, (_, _, count) in MODELS.items()}, "LeViT": 5, "by hand": 1}


@torch.no_grad()
def answer(model, x):
    return first_tensor(model(x))


@pytest.mark.parametrize("name", COUNTS)
def test_neurons_that_read_and_write_nothing_go_without_a_trace(name):
    model, x = make(name)
    model, x = model.double(), x[:2].double()
    with visible(model, keep=True):
        mlps = find_mlps(model)
        gone = {name: torch.randperm(mlp.width)[: mlp.width // 3] for name, mlp in mlps.items()}
        for name, mlp in mlps.items():
            mlp.fc2.weight.data[:, gone[name]] = 0
        before = answer(model, x)
        for name, mlp in mlps.items():
            keep = torch.tensor([j for j in range(mlp.width) if j not in gone[name].tolist()])
            narrow_mlp(mlp, keep)
            for layer in mlp.layers:
                assert len(layer.weight) == len(keep) == mlp.width
    put_back(model)
    torch.testing.assert_close(answer(model, x), before, rtol=1e-10, atol=1e-10)
    assert narrower_mlps(model).keys() == mlps.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_plans_count_what_goes_and_files_and_full_widths_give_the_same(name, tmp_path):
    model, x = make(name)
    stats = vitlr.calibrate(model, x.split(8))
    plan = vitlr.plan(model, stats, "params:95%", method="widths", width_step=4)
    small = vitlr.apply(model, plan)
    with visible(model):
        assert len(find_mlps(model)) == COUNTS[name]
    assert plan.narrowed and cost.count_params(small) == plan.params_kept <= 0.95 * plan.params
    assert cost.measure(small, stats.input_shape).macs == plan.macs_kept
    assert cost.count_bytes(small) == plan.bytes_kept
    assert not {type(module).__name__ for module in small.modules()} & {"PointwiseConv", "LowRankLinear"}
    vitlr.save(small, tmp_path / "m.safetensors", model_args=False)
    assert torch.equal(answer(vitlr.load(tmp_path / "m.safetensors", model=make(name)[0]), x), answer(small, x))
    dense = vitlr.to_dense(small, full_width=True)
    assert {k: v.shape for k, v in dense.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    torch.testing.assert_close(answer(dense, x), answer(small, x), rtol=1e-3, atol=1e-3)


def test_norms_over_all_neurons_of_convolutions_keep_the_width_and_say_so():
    model = vitlr.create_model("convnextv2_atto", num_classes=5, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    with visible(model):
        assert not find_mlps(model)
        said = set(refused_mlps(model).values())
    assert len(said) == 4 and all("its grn is a GlobalResponseNorm over the hidden neurons" in why for why in said)


class Mixing(nn.Sequential):
    """What stands between is no layer of single channels, or stands where channels are another dimension."""


@pytest.mark.parametrize(
    "between",
    [
        [nn.Conv2d(16, 16, 3, padding=1, groups=8)],
        [nn.GroupNorm(4, 16)],
        [nn.Softmax(dim=1)],
        [nn.Conv2d(16, 16, 1, groups=16), nn.InstanceNorm2d(16, affine=True)],
    ],
)
def test_layers_that_mix_channels_or_have_weights_of_another_kind_keep_the_width(between):
    model = nn.Module()
    model.mlp = Mixing(nn.Conv2d(8, 16, 1), *between, nn.Conv2d(16, 8, 1))
    with visible(model):
        assert not find_mlps(model) and "keeps its width" in refused_mlps(model)["mlp"]


def test_a_norm_by_batch_over_tokens_is_none_of_neurons():
    """In [images, tokens, neurons] it takes tokens for channels, of which there may be as many."""
    model = nn.Module()
    model.mlp = Mixing(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    assert not find_mlps(model) and "keeps its width" in refused_mlps(model)["mlp"]


def test_narrow_convolutions_without_biases_are_told_apart_without_memory_too():
    """As files are compared with models before memory is taken."""
    with torch.device("meta"):
        model = nn.Module()
        model.mlp = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False))
    with visible(model, keep=True):
        narrow_mlp(find_mlps(model)["mlp"], torch.arange(12))
    put_back(model)
    assert [type(module) for module in model.mlp] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert [tuple(p.shape) for p in model.parameters()] == [(12, 8, 1, 1), (8, 12, 1, 1)]
