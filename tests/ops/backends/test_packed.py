"""Packed copies: made once, made again when the weights changed, freed with them."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from vitlr.nn import LowRankLinear
from vitlr.ops.backends import native, packed

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native extension: {native.why_not()}")

K, N, R = 24, 40, 6


@pytest.fixture(autouse=True)
def packs(monkeypatch):
    """The weights that were packed since; the CPU kernel runs whatever the shape."""
    monkeypatch.setenv("VITLR_BACKEND", "cpu")
    gc.collect()
    made, pack = [], native.pack
    monkeypatch.setattr(native, "pack", lambda W, isa: made.append(tuple(W.shape)) or pack(W, isa))
    return made


def check(layer, x=None):
    """The layer's output is that of its weights as they are now."""
    x = torch.randn(5, K).to(layer.up.weight.dtype) if x is None else x
    W, bias = layer.up.weight.double() @ layer.down.weight.double(), layer.up.bias.double()
    tolerance = 1e-4 if x.dtype == torch.float32 else 0.1
    y = layer(x)
    torch.testing.assert_close(y.double(), x.double() @ W.mT + bias, rtol=tolerance, atol=tolerance)
    return y


def test_packed_once(packs):
    layer, x = LowRankLinear(K, N, R), torch.randn(5, K)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            check(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    assert packs == [(R, K), (N, R)]


def zeroed_by_numpy(layer):
    layer.down.weight.detach().numpy()[:] = 0


def signs_of_every_other_column(layer):
    layer.down.weight.data[:, 1::2].neg_()  # the top bit of every word of 64, which multiplying does not move


CHANGES = {
    "in place": lambda layer: layer.down.weight.add_(1),
    "one entry": lambda layer: layer.down.weight[2:3, 3:4].add_(1),
    "through .data": lambda layer: layer.down.weight.data.mul_(2),
    "through NumPy": zeroed_by_numpy,
    "one column through .data": lambda layer: layer.down.weight.data[:, 5].zero_(),
    "one entry through .data": lambda layer: layer.down.weight.data[3, 7].add_(1),
    "signs through .data": signs_of_every_other_column,
    "new memory": lambda layer: setattr(layer.down.weight, "data", torch.randn(R, K)),
    "a new parameter": lambda layer: setattr(layer.down, "weight", torch.nn.Parameter(torch.randn(R, K))),
    "load_state_dict": lambda layer: layer.load_state_dict(LowRankLinear(K, N, R).state_dict()),
    "assigned state": lambda layer: layer.load_state_dict(LowRankLinear(K, N, R).state_dict(), assign=True),
    "bfloat16": lambda layer: layer.bfloat16(),
    "half and back": lambda layer: layer.half().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(packs, change):
    layer = LowRankLinear(K, N, R)
    with torch.no_grad():
        check(layer)
        packs.clear()
        CHANGES[change](layer)
        check(layer)
    assert (R, K) in packs


def test_a_column_written_through_data_is_seen_at_the_sizes_of_real_models(packs):
    """Spread samples of these shapes would all lie in column 0."""
    layer, x = LowRankLinear(768, 768, 128), torch.randn(5, 768)
    with torch.no_grad():
        layer(x)
        layer.up.weight.data[:, 64:] = 0
        expected = torch.nn.functional.linear(layer.down(x), layer.up.weight, layer.up.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_every_step_of_an_optimiser_is_seen(packs):
    layer = LowRankLinear(K, N, R)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        check(layer).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert packs == 3 * [(R, K), (N, R)]


def test_weights_of_inference_mode_have_no_version(packs):
    with torch.inference_mode():
        layer = LowRankLinear(K, N, R)
        check(layer)
        check(layer)
        assert packs == [(R, K), (N, R)]
        layer.down.weight[3, 7] += 1  # one entry that a sample would miss
        check(layer)
    assert packs == [(R, K), (N, R), (R, K)]


def test_memory_goes_with_the_weights():
    before = packed.count()
    layer = LowRankLinear(K, N, R)
    check(layer)
    twin = copy.deepcopy(layer)
    check(twin)
    assert packed.count() == before + 4
    for dtype in (torch.bfloat16, torch.float32):  # the old copies are replaced, not kept beside
        check(layer.to(dtype))
    assert packed.count() == before + 4
    del layer
    gc.collect()
    assert packed.count() == before + 2
    del twin
    gc.collect()
    assert packed.count() == before


def test_casts_of_autocast_leave_nothing_behind():
    layer, before = LowRankLinear(K, N, R), packed.count()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(torch.randn(5, K)).dtype == torch.bfloat16
    gc.collect()
    assert packed.count() == before


def test_another_instruction_set_packs_anew(packs, monkeypatch):
    layer = LowRankLinear(K, N, R)
    with torch.no_grad():
        check(layer)
        monkeypatch.setenv("VITLR_CPU_ISA", "portable")
        check(layer)
    assert len(packs) == (2 if native.best_isa() == "portable" else 4)
