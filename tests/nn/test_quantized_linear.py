"""The layer of integers: exactly the dense layer of its weight, in every way a layer is used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vitlr.errors import InputError
from vitlr.nn.quantized_linear import QuantizedLinear, step

N, K = 40, 24
ZEROS = torch.zeros(N, dtype=torch.int16), torch.zeros(K, dtype=torch.int16)  # exponents


@pytest.fixture(params=[False, True], ids=["a byte", "two columns in two bytes"])
def layer(request) -> QuantizedLinear:
    codes = (torch.randn(N, K) * 3).round().to(torch.int16)
    if request.param:
        codes[:, [3, 17]] = torch.randint(-32639, 32640, (N, 2)).short()
        codes[0, 3], codes[1, 17] = 32639, -32639
    rows, columns = torch.randint(-60, -20, (N,)).short(), torch.randint(-9, 10, (K,)).short()
    return QuantizedLinear.from_codes(codes, rows, columns, torch.randn(N))


def test_steps_are_powers_of_the_eighth_root_of_two():
    rows, columns = torch.arange(-40, 40).short(), torch.arange(-30, 30).short()
    expected = 2.0 ** ((rows[:, None].double() + columns) / 8)
    torch.testing.assert_close(step(rows, columns).double(), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_dense_layer_of_its_weight(layer, bias):
    layer.bias = layer.bias if bias else None
    x, dense = torch.randn(2, 5, K), layer.to_linear()
    steps = 2.0 ** ((layer.row_exponent[:, None].double() + layer.column_exponent) / 8)
    W = layer.codes.double() * steps
    if layer.twice is not None:
        W[:, [3, 17]] += layer.fine.double() * steps[:, [3, 17]] / 256
    torch.testing.assert_close(dense.weight.double(), W, rtol=2e-7, atol=0)
    assert torch.equal(layer(x), dense(x))


def test_gradients_reach_inputs_and_bias(layer):
    x = torch.randn(3, K, requires_grad=True)
    dense, twin = layer.to_linear(), x.detach().clone().requires_grad_()
    for module, inputs in ((layer, x), (dense, twin)):
        module(inputs).square().sum().backward()
    assert torch.equal(x.grad, twin.grad) and torch.equal(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_integers_stay_whatever_the_dtype(layer, dtype):
    moved = copy.deepcopy(layer).to(dtype)
    assert torch.equal(moved.codes, layer.codes) and moved.codes.dtype == torch.int8
    x = torch.randn(4, K, dtype=dtype)
    assert torch.equal(moved(x), nn.functional.linear(x, layer.dense_weight().to(dtype), layer.bias.to(dtype)))


def test_autocast_compile_and_export(layer):
    x = torch.randn(4, K)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.to_linear()(x)) and layer(x).dtype == torch.bfloat16
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    exported = torch.export.export(layer.eval(), (x,)).module()
    assert torch.equal(exported(x), layer(x))


def test_state_dicts_carry_it(layer):
    twin = QuantizedLinear(K, N)
    twin.load_state_dict(
        QuantizedLinear.from_codes(torch.full((N, K), 999).short(), *ZEROS, torch.zeros(N)).state_dict()
    )
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(4, K)
    assert torch.equal(twin(x), layer(x))
    state = layer.state_dict() | {"codes": layer.codes.float()}
    with pytest.raises(InputError, match=r"codes is torch.float32, expected torch.int8"):
        twin.load_state_dict(state)


def test_what_rounding_never_gives_is_refused(layer):
    parts = layer.codes, layer.row_exponent, layer.column_exponent
    for index, wrong in ((0, layer.codes.float()), (1, layer.row_exponent[:-1]), (2, layer.column_exponent + 2000)):
        given = [*parts[:index], wrong, *parts[index + 1 :]]
        with pytest.raises(InputError, match=r"codes: (codes is|row_exponent is|column_exponent reaches)"):
            QuantizedLinear.from_codes(*given, None)


def test_a_code_of_two_bytes_is_what_it_was():
    codes = torch.tensor([[32639, 127, -128], [-32639, -127, 127], [128, 0, 5], [-129, 1, 0]], dtype=torch.int16)
    layer = QuantizedLinear.from_codes(codes, torch.zeros(4).short(), torch.tensor([-8, 0, 8]).short(), None)
    assert layer.twice.tolist() == [0, 2] and layer.codes.dtype == layer.fine.dtype == torch.int8
    assert torch.equal(layer.dense_weight(), codes * torch.tensor([0.5, 1.0, 2.0]))


@pytest.mark.parametrize("twice", [[3, 3], [-1, 2], [2, 1], [0, K]])
def test_columns_that_are_none_are_refused(twice):
    layer = QuantizedLinear.from_codes(torch.randint(-3000, 3000, (N, K)).short(), *ZEROS, None)
    layer.fine, layer.twice = layer.fine[:, :2], torch.tensor(twice, dtype=torch.int32)
    with pytest.raises(InputError, match="twice is no rising list of columns"):
        layer.check("layer a")
