"""LowRankLinear among hooks, compilers, exporters, adapters and quantisers."""

from __future__ import annotations

import pytest
import torch
from fake_kernels import fake_kernel
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from vitlr.errors import InputError
from vitlr.nn import LowRankLinear

K, N, R = 24, 40, 6


def layer(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return LowRankLinear(K, N, R, bias=bias, dtype=dtype)


def hook(module, *_):
    module.seen = True


INTRUSIONS = {
    "forward hook": lambda low: low.up.register_forward_hook(hook),
    "forward pre-hook": lambda low: low.down.register_forward_pre_hook(hook),
    "backward hook": lambda low: low.up.register_full_backward_hook(hook),
    "backward pre-hook": lambda low: low.down.register_full_backward_pre_hook(hook),
    "forward replaced": lambda low: setattr(low.up, "forward", low.up.forward),
    "parametrisation": lambda low: weight_norm(low.down),
    "another class": lambda low: setattr(low, "up", nn.Sequential(low.up)),
    "a tensor subclass": lambda low: setattr(low.up, "weight", nn.Parameter(Subclass(low.up.weight.detach()))),
}


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("name", INTRUSIONS)
def test_children_that_are_not_plain_are_called(name):
    low, x = layer(), torch.randn(3, K)
    with fake_kernel("lowrank_linear") as calls:
        low(x)
        assert len(calls) == 1
        INTRUSIONS[name](low)
        y = low(x)
        assert len(calls) == 1
        assert torch.equal(y, low.up(low.down(x)))


def test_hooks_fire_once_each_and_see_the_children():
    low, x, seen = layer(), torch.randn(2, 3, K), []
    with fake_kernel("lowrank_linear") as calls:
        low.register_forward_hook(lambda module, args, out: seen.append(("whole", tuple(out.shape))))
        low(x)
        assert len(calls) == 1  # a hook on the layer itself is served by the kernel
        low.down.register_forward_hook(lambda module, args, out: seen.append(("down", tuple(out.shape))))
        low(x)
        assert len(calls) == 1
    assert seen == [("whole", (2, 3, N)), ("down", (2, 3, R)), ("whole", (2, 3, N))]


def test_global_hooks_see_the_children():
    low, seen = layer(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with fake_kernel("lowrank_linear") as calls:
            low(torch.randn(2, K))
    finally:
        handle.remove()
    assert seen == ["Linear", "Linear", "LowRankLinear"] and not calls


@pytest.mark.parametrize("kernel", [False, True])
def test_flops_are_counted(kernel):
    low = layer()
    with (
        fake_kernel("lowrank_linear", lambda key: None if kernel else "not now"),
        FlopCounterMode(display=False) as counter,
    ):
        low(torch.randn(2, 5, K))
    assert counter.get_total_flops() == 2 * 10 * R * (K + N)


@pytest.mark.parametrize("kernel", [False, True])
def test_compiles_as_one_graph_for_any_number_of_rows(kernel):
    model = nn.Sequential(layer(), nn.GELU(), LowRankLinear(N, K, 5, bias=False))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    # Only one of the two layers has a kernel: decisions must not be mixed up.
    with fake_kernel("lowrank_linear", lambda key: None if kernel and key.r == R else "not now") as calls:
        for rows in (2, 5, 197, 3):
            x = torch.randn(rows, K)
            torch.testing.assert_close(compiled(x), model(x))
        assert counter.frame_count == 1
        ops = [str(node.target) for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
        assert sum("lowrank_linear" in op for op in ops) == kernel
        assert len(calls) == 8 * kernel  # four rows, compiled and eager
        loss = compiled(x).square().sum()
        got = torch.autograd.grad(loss, list(model.parameters()))
        want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close(got, want)


def test_the_same_dtype_compiled_under_autocast():
    low, x = layer(), torch.randn(3, K)
    compiled = torch.compile(low, fullgraph=True, backend="aot_eager")
    with fake_kernel("lowrank_linear") as calls, torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = compiled(x), low(x)
    assert y.dtype == z.dtype == torch.bfloat16 and torch.equal(y, z) and len(calls) == 2


def test_exports_as_two_plain_linears():
    low, x = layer(), torch.randn(4, K)
    rows = torch.export.Dim("rows", min=2, max=512)
    with fake_kernel("lowrank_linear") as calls:
        for strict in (False, True):
            program = torch.export.export(low, (x,), dynamic_shapes=({0: rows},), strict=strict)
            targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
            assert targets == ["aten.linear.default"] * 2
            z = torch.randn(9, K)
            torch.testing.assert_close(program.module()(z), low.up(low.down(z)))
        assert not calls


def test_functional_transforms():
    low, x = layer(), torch.randn(4, K)
    parameters = dict(low.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(low, parameters, (x,)).square().sum()

    with fake_kernel("lowrank_linear") as calls:
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        assert not calls
        want = torch.autograd.grad(low(x).square().sum(), list(low.parameters()))
    torch.testing.assert_close([per_sample[name].sum(0) for name in parameters], list(want))


def test_peft_adapts_the_children():
    peft = pytest.importorskip("peft")
    model, x = nn.Sequential(layer()), torch.randn(3, K)
    before = model(x)
    config = peft.LoraConfig(target_modules=["down", "up"], r=2, init_lora_weights=False)
    with fake_kernel("lowrank_linear") as calls:
        adapted = peft.get_peft_model(model, config)
        after = adapted(x)
        assert not calls and not torch.allclose(after, before)
        after.sum().backward()
        trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
        assert len(trained) == 4 and all("lora" in name for name in trained)
        with pytest.raises(InputError, match="merge"):
            adapted.base_model.model[0].to_linear()
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(x), after)
        assert len(calls) == 1  # plain again


def test_an_override_that_cannot_be_met_stops_compilation_too(monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "cuda")
    with pytest.raises(Exception, match="VITLR_BACKEND=cuda: lowrank_linear cannot run here"):
        torch.compile(layer(), fullgraph=True, backend="aot_eager")(torch.randn(2, K))


def test_torchao_quantises_the_children():
    quantization = pytest.importorskip("torchao.quantization")
    model, x = nn.Sequential(layer()), torch.randn(3, K)
    before = model(x)
    with fake_kernel("lowrank_linear") as calls:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        assert type(model[0].up.weight) is not nn.Parameter
        after = model(x)
        assert not calls
    assert not torch.equal(after, before)
    assert (after - before).abs().max() < 0.05 * before.abs().max()
    with pytest.raises(InputError, match="not a plain linear"):
        model[0].to_linear()
