"""Modules on Triton kernels, in every mode in which a model may run: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitlr.nn import LowRankLinear, LowRankMLP, ResidualLowRankLinear

pytest.importorskip("triton", reason="triton is not installed")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
K, D = 48, 80


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "triton")


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = LowRankLinear(K, D, 16), nn.GELU(), LowRankLinear(D, K, 24)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "linear": LowRankLinear(K, D, 16),
        "mlp": LowRankMLP(_Mlp()),
        "residual": ResidualLowRankLinear.from_linear(nn.Linear(K, D), 8, residual="int8", group_size=16),
    }


@pytest.fixture(params=["linear", "mlp", "residual"])
def module(request):
    return modules()[request.param].to(DEVICE)


def plain(module: nn.Module, x: torch.Tensor, monkeypatch) -> torch.Tensor:
    with monkeypatch.context() as context:
        context.setenv("VITLR_BACKEND", "torch")
        return module(x)


@pytest.mark.parametrize("shape", [(7, K), (2, 5, K), (2, 3, 5, K), (0, K), (2, 0, K)], ids=str)
def test_shapes(module, shape, monkeypatch):
    x = torch.randn(shape, device=DEVICE)
    torch.testing.assert_close(module(x), plain(module, x, monkeypatch), rtol=1e-4, atol=1e-5)


def test_compiled_without_a_graph_break(module, monkeypatch):
    x = torch.randn(2, 5, K, device=DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    torch.testing.assert_close(compiled(x), plain(module, x, monkeypatch), rtol=1e-4, atol=1e-5)


def test_trained_through_the_kernel(module, monkeypatch):
    x = torch.randn(2, 5, K, device=DEVICE, requires_grad=True)
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
    ours = torch.autograd.grad(module(x).square().sum(), inputs)
    theirs = torch.autograd.grad(plain(module, x, monkeypatch).square().sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_autocast(module, monkeypatch):
    x, dtype = torch.randn(2, 5, K, device=DEVICE), torch.bfloat16 if CUDA else torch.float16
    with torch.autocast(DEVICE.type, dtype=dtype):
        y, expected = module(x), plain(module, x, monkeypatch)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not CUDA, reason="needs CUDA: a CUDA graph is captured")
@torch.inference_mode()
def test_cuda_graphs(module, monkeypatch):
    x = torch.randn(2, 5, K, device=DEVICE)
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(compiled(x), plain(module, x, monkeypatch), rtol=1e-4, atol=1e-5)


def test_exported_as_plain_linears(module):
    x = torch.randn(2, 5, K, device=DEVICE)
    program = torch.export.export(module.eval(), (x,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("vitlr" in name for name in called), called
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)
