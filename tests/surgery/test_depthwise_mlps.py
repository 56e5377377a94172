"""MLPs with a depthwise convolution between their linears: its channels go with the neurons, exactly."""

import pytest
import torch
from torch import nn

import vitlr
from vitlr.anatomy.mlps import find_mlps
from vitlr.data.batches import first_tensor
from vitlr.measuring import cost
from vitlr.surgery.mlps import narrow_mlp

ARGS = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [1, 2], "num_encoder_blocks": 2}
ARGS |= {"sr_ratios": [2, 1], "mlp_ratios": [4, 4], "patch_sizes": [7, 3], "strides": [4, 2], "num_labels": 5}


def timms():
    return vitlr.create_model("pvt_v2_b0", num_classes=5, depths=(1, 1, 1, 1))


def pvt():
    library = pytest.importorskip("transformers")
    return library.PvtV2ForImageClassification(library.PvtV2Config(**ARGS, image_size=32))


def segformer():
    library = pytest.importorskip("transformers")
    return library.SegformerForImageClassification(library.SegformerConfig(**ARGS))


MODELS = {"timm's PVTv2": timms, "transformers' PVTv2": pvt, "transformers' SegFormer": segformer}


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model


def images(count=40):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def answer(model, x):
    return first_tensor(model(x))


@pytest.mark.parametrize("name", MODELS)
def test_neurons_that_read_and_write_nothing_go_without_a_trace(name):
    model, x = make(name).double(), images(4).double()
    mlps = find_mlps(model)
    assert len(mlps) == sum(type(m) is nn.Conv2d and m.groups > 1 for m in model.modules())
    gone = {name: torch.randperm(mlp.width)[: mlp.width // 3] for name, mlp in mlps.items()}
    for name, mlp in mlps.items():
        mlp.fc2.weight.data[:, gone[name]] = 0
    before = answer(model, x)
    for name, mlp in mlps.items():
        keep = torch.tensor([j for j in range(mlp.width) if j not in gone[name].tolist()])
        narrow_mlp(mlp, keep)
        (conv,) = mlp.layers
        assert conv.groups == conv.in_channels == len(conv.weight) == len(keep) == mlp.width
    torch.testing.assert_close(answer(model, x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_plans_count_what_the_convolutions_lose_and_files_and_full_widths_give_the_same(name, tmp_path):
    model, x = make(name), images()
    stats = vitlr.calibrate(model, x.split(8))
    plan = vitlr.plan(model, stats, "params:95%", method="widths", width_step=4)
    small = vitlr.apply(model, plan)
    assert plan.narrowed and cost.count_params(small) == plan.params_kept <= 0.95 * plan.params
    assert cost.measure(small, stats.input_shape).macs == plan.macs_kept
    assert cost.count_bytes(small) == plan.bytes_kept
    vitlr.save(small, tmp_path / "m.safetensors", model_args=False)
    assert torch.equal(answer(vitlr.load(tmp_path / "m.safetensors", model=make(name)), x), answer(small, x))
    dense = vitlr.to_dense(small, full_width=True)
    assert {k: v.shape for k, v in dense.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    torch.testing.assert_close(answer(dense, x), answer(small, x), rtol=1e-3, atol=1e-3)
