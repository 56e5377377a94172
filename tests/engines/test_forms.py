"""Every form of a layer exports to a file that engines answer as the model does, for any number of images."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

import vitlr
from vitlr.engines.export import difference, export
from vitlr.engines.running import ENGINES, OnnxRuntime
from vitlr.nn import Int8Linear, LowRankLinear, QuantizedLinear, ResidualLowRankLinear, SelectedLinear

onnx = pytest.importorskip("onnx")


def operations(path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def quantized(linear: nn.Linear, twice: bool) -> QuantizedLinear:
    """The layer rounded to a step of 2^-5, with two columns of two bytes."""
    codes = (linear.weight.detach() * 32).round().clamp(-127, 127).to(torch.int16)
    if twice:
        codes[:, [1, 5]] = (linear.weight.detach()[:, [1, 5]] * 8192).round().to(torch.int16)
    rows = torch.full((linear.out_features,), -40).short()
    columns = torch.arange(linear.in_features).short() % 3
    if twice:
        columns[[1, 5]] = -64
    return QuantizedLinear.from_codes(codes, rows, columns, linear.bias.detach())


FORMS = {
    "low rank": lambda linear: LowRankLinear.from_linear(linear, 8),
    "channels gone": lambda linear: SelectedLinear.from_linear(linear, range(3, 30)),
    "a residual": lambda linear: ResidualLowRankLinear.from_linear(linear, 8, residual="int4", group_size=16),
    "codes": lambda linear: quantized(linear, twice=False),
    "codes of two bytes": lambda linear: quantized(linear, twice=True),
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_layer_of_any_form_answers_as_it_does_here(form, tmp_path):
    model = nn.Sequential(nn.Flatten(2), nn.LayerNorm(32), nn.Linear(32, 48)).eval()
    nn.init.normal_(model[1].weight), nn.init.normal_(model[1].bias)
    model[2] = FORMS[form](model[2])
    images = torch.randn(4, 3, 4, 8)
    done = export(model, tmp_path / "layer.onnx", images=images)
    assert done.differences["onnxruntime"] < 1e-6 and done.products == 0
    engine = OnnxRuntime(tmp_path / "layer.onnx", threads=1)
    for count in (1, 3, 7):
        x = torch.randn(count, 3, 4, 8)
        assert difference(engine(x), model(x)) < 1e-6
    if "codes" in form:
        found = operations(tmp_path / "layer.onnx")
        assert found["DequantizeLinear"] == 1
        assert found["Mul"] == (form != "codes")  # columns' steps are in the norm, but where columns are taken twice


@torch.no_grad()
def test_codes_stay_bytes_in_the_file(tmp_path):
    model = nn.Sequential(nn.Flatten(2), nn.Linear(256, 256)).eval()
    images = torch.randn(2, 3, 16, 16)
    sizes = []
    for form in (model, nn.Sequential(model[0], quantized(model[1], twice=False))):
        sizes.append(export(form, tmp_path / "layer.onnx", images=images).bytes)
    assert sizes[1] < 0.35 * sizes[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("K", "beyond", "stored"), [(64, 0, 64), (64, 3, 68), (64, 16, 80), (64, 17, None), (63, 0, 64)]
)
def test_codes_that_four_bits_hold_take_half_a_byte(K, beyond, stored, tmp_path):
    codes = torch.randint(-8, 8, (48, K), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes[5, :beyond] = (20 + 5 * torch.arange(beyond)) * (-1) ** torch.arange(beyond)
    columns = torch.arange(K).short() % 3
    layer = QuantizedLinear.from_codes(codes, torch.full((48,), -30).short(), columns, torch.ones(48))
    model, images = nn.Sequential(nn.Flatten(2), layer).eval(), torch.randn(3, 3, 1, K)
    done = export(model, tmp_path / "codes.onnx", images=images)
    assert max(done.differences.values()) < 1e-6
    found = [t for t in onnx.load(tmp_path / "codes.onnx").graph.initializer if len(t.dims) == 2]
    kind = onnx.TensorProto.INT8 if stored is None else onnx.TensorProto.INT4
    assert [(t.data_type, list(t.dims)) for t in found] == [(kind, [stored or K, 48])]
    assert stored is None or len(found[0].raw_data) == stored * 48 / 2


@torch.no_grad()
def test_low_rank_is_two_products_and_a_fused_model_the_same_file(low, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    plain = export(low, tmp_path / "low.onnx", images=images)
    again = export(vitlr.fuse(low, fold=False), tmp_path / "fused.onnx", images=images)
    found = operations(tmp_path / "low.onnx")
    assert found["MatMul"] + found["Gemm"] == 2 * 3 + 1 + 2 + 1  # low rank, proj, scores and values, head
    assert again.bytes == plain.bytes and operations(tmp_path / "fused.onnx") == found
    assert max(plain.differences.values()) < 1e-5


@torch.no_grad()
def test_a_model_of_bytes_multiplies_bytes_in_every_engine(vit, many, stats, tmp_path):
    done = export(vit, tmp_path / "int8.onnx", bits=8, stats=stats, images=many[:4])
    assert done.products == 4 and set(done.int8.values()) == {4}
    small = vitlr.fuse(vit, bits=8, stats=stats)
    noise = difference(vitlr.to_dense(small)(many), small(many))
    for name in done.differences:
        assert difference(ENGINES[name](tmp_path / "int8.onnx", threads=1)(many), small(many)) < noise
    found = operations(tmp_path / "int8.onnx")
    assert found["QuantizeLinear"] == 4 and found["DequantizeLinear"] == 8
    # What quantisers multiply and add stands alone behind attention and GELU, and is in the norms elsewhere.
    quantisers = [node for node in onnx.load(tmp_path / "int8.onnx").graph.node if node.op_type == "QuantizeLinear"]
    made = {output: node for node in onnx.load(tmp_path / "int8.onnx").graph.node for output in node.output}
    assert Counter(made[node.input[0]].op_type for node in quantisers) == {"LayerNormalization": 2, "Add": 2}


@torch.no_grad()
def test_channels_of_several_columns_are_read_as_often(vit, many, tmp_path):
    huge = copy.deepcopy(vit)
    huge.blocks[0].mlp.fc1.weight[5] *= 10  # one neuron that is now and then huge
    stats = vitlr.calibrate(huge, many.split(8), hidden=False, extras=("ranges",))
    small = vitlr.unfuse(vitlr.fuse(huge, bits=8, stats=stats))
    wide = [m.wide for m in small.modules() if isinstance(m, Int8Linear) and m.wide is not None]
    assert any(5 in w.tolist() for w in wide)
    done = export(small, tmp_path / "int8.onnx", images=many[:4])
    noise = difference(vitlr.to_dense(small)(many), small(many))
    for name in done.differences:
        assert difference(ENGINES[name](tmp_path / "int8.onnx", threads=1)(many), small(many)) < noise
    assert operations(tmp_path / "int8.onnx")["Concat"] >= len(wide)


@torch.no_grad()
def test_low_rank_of_bytes_is_two_products_of_bytes(low, many, low_stats, tmp_path):
    small = vitlr.unfuse(vitlr.fuse(low, bits=8, stats=low_stats))
    of_bytes = {name for name, module in small.named_modules() if isinstance(module, Int8Linear)}
    assert {"blocks.0.attn.qkv.down", "blocks.0.attn.qkv.up"} <= of_bytes
    done = export(small, tmp_path / "low.onnx", images=many[:4])
    assert done.products == len(of_bytes) and set(done.int8.values()) == {len(of_bytes)}


@torch.no_grad()
def test_any_size_where_the_model_takes_any(tiny_vit, tmp_path):
    free = tiny_vit(depth=1, dynamic_img_size=True)
    export(free, tmp_path / "free.onnx", dynamic_size=True)
    engine = OnnxRuntime(tmp_path / "free.onnx", threads=1)
    for size in ((32, 32), (48, 32), (24, 64)):
        x = torch.randn(3, 3, *size)
        assert difference(engine(x), free(x)) < 1e-5


@torch.no_grad()
def test_a_fixed_number_of_images_is_what_the_file_takes(vit, tmp_path):
    export(vit, tmp_path / "five.onnx", batch_size=5)
    shape = onnx.load(tmp_path / "five.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in shape] == [5, 3, 32, 32]


@torch.no_grad()
def test_a_model_in_half_precision_exports_in_single(vit, tmp_path):
    half = vitlr.to_dense(vit).bfloat16()
    done = export(half, tmp_path / "half.onnx")
    assert max(done.differences.values()) < 1e-5 and half.head.weight.dtype == torch.bfloat16
