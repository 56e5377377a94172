"""The two Triton variants of the low-rank linear, against torch: values, strides, activations, what is not finite."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tolerance import assert_close_to

from vitlr.nn import LowRankLinear
from vitlr.ops import explain
from vitlr.ops.layers.activations import ACTIVATIONS
from vitlr.ops.layers.lowrank_linear import lowrank_linear, reference
from vitlr.triton_kernels import lowrank_linear as row_block
from vitlr.triton_kernels import lowrank_linear_split as split
from vitlr.triton_kernels import tables
from vitlr.triton_kernels.targets import INTERPRETER, TARGETS

# (M, K, N, r): ragged in every size; one and two powers of two in the rank; one, two, four and eight shares of K
SHAPES = [
    (1, 24, 40, 6),
    (63, 200, 130, 33),
    (197, 72, 70, 90),
    (130, 64, 64, 192),
    (5, 520, 24, 20),
    (3, 1100, 40, 16),
]


@pytest.fixture(params=[row_block, split], ids=["row_block", "split"])
def kernel(request, poison):
    """The module of a variant, its memory poisoned."""
    poison(request.param)
    return request.param


def arguments(M, K, N, r, dtype, device, rows=None):
    """x [*rows, K], B, A, bias, residual of unit scale."""
    generator = torch.Generator().manual_seed(M + K + N + r)
    shapes = ((*(rows or (M,)), K), (r, K), (N, r), (N,), (*(rows or (M,)), N))
    x, B, A, bias, residual = (torch.randn(shape, generator=generator) for shape in shapes)
    return [t.to(device, dtype) for t in (x, B / K**0.5, A / r**0.5, bias, residual)]


def check(y, args, act="none"):
    x, B, A, bias, residual = args
    exact = reference(*(None if arg is None else arg.double() for arg in args), act)
    assert y.is_contiguous()
    assert_close_to(y, reference(x, B, A, bias, residual, act), exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(kernel, shape, dtype, device):
    args = arguments(*shape, dtype, device)
    check(kernel.run(*args, "none"), args)


def test_the_shapes_reach_every_number_of_shares():
    shares = {split.split(M, K, N, r, torch.float16, INTERPRETER).splits for M, K, N, r in SHAPES}
    assert shares == {1, 2, 4, 8}


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_what_follows_the_products(kernel, act, bias, residual, device):
    args = arguments(10, 24, 40, 6, torch.float32, device)
    args[3:] = [args[3] if bias else None, args[4] if residual else None]
    check(kernel.run(*args, act), args, act)


def strided(device, dtype):
    """Arguments that lie in memory in other ways than densely by rows."""
    x, B, A, bias, residual = arguments(30, 24, 40, 6, dtype, device, rows=(2, 3, 5))
    wide = torch.randn(2, 3, 5, 48).to(device, dtype)
    return {
        "channels first": (x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), B, A, bias, residual),
        "one image, channels first": (
            x[:1].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
            *(B, A, bias),
            residual[:1].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        ),
        "part of wider rows": (wide[..., 8:32], B, A, bias, wide[..., 4:44]),
        "every second": (wide[..., ::2], B, A, bias, residual),
        "first token": (x[:, 0], B, A, bias, residual[:, 0]),
        "expanded": (x[:1, :1, :1].expand(4, 1, 1, 24), B, A, bias, residual[0, 0, 0].expand(4, 1, 1, 40)),
        "factors by columns": (x, B.mT.contiguous().mT, A.mT.contiguous().mT, bias, residual),
        "sparse bias": (x, B, A, torch.randn(80).to(device, dtype)[::2], residual),
        "one dimension": (x[0, 0, 0], B, A, bias, residual[0, 0, 0]),
    }


@pytest.mark.parametrize("name", strided("cpu", torch.float32))
def test_any_strides(kernel, name, dtype, device):
    args = strided(device, dtype)[name]
    check(kernel.run(*args, "none"), args)


def test_rows_further_apart_than_32_bits_reach(kernel, device):
    far = torch.empty(2**31 + 8, dtype=torch.float16, device=device)  # only the pages that are used become memory
    x, B, A, bias, residual = arguments(3, 8, 16, 4, torch.float16, device)
    apart = far.as_strided((3, 8), (2**30, 1))
    args = [apart.copy_(x), B, A, bias, residual]
    check(kernel.run(*args, "none"), args)


@pytest.mark.parametrize("rows", [(0,), (2, 0, 3)])
def test_no_rows(kernel, rows, device):
    x, B, A, bias, residual = arguments(0, 24, 40, 6, torch.float32, device, rows=rows)
    assert kernel.run(x, B, A, bias, residual, "gelu").shape == (*rows, 40)


@pytest.mark.parametrize("r", [3, 40])
def test_what_is_not_finite_stays_in_its_row(kernel, r, dtype, device):
    x, B, A, bias, residual = arguments(70, 40, 24, r, dtype, device)
    x, B, A = x.abs(), B.abs(), A.abs()
    x[1, 7], x[2, 3], x[68, 0] = float("nan"), float("inf"), -float("inf")
    y, expected = kernel.run(x, B, A, bias, residual, "none"), reference(x, B, A, bias, residual)
    assert expected[1].isnan().all() and expected[2].isposinf().all() and expected[68].isneginf().all()
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_the_same_every_time(kernel, device):
    args = arguments(63, 1100, 130, 33, torch.float16, device)
    assert torch.equal(kernel.run(*args, "gelu"), kernel.run(*args, "gelu"))


def test_factors_of_other_ranks_than_registers_hold(poison, device, dtype):
    poison(split)
    args = arguments(5, 24, 16, 300, dtype, device)
    check(split.run(*args, "none"), args)


def test_tensor_cores_take_larger_tiles_than_exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    tiles = [row_block.row_block(4096, 768, 768, r, True, torch.float32, TARGETS["sm_90"]).BM for r in (64, 128, 256)]
    assert tiles == [64, 64, 64]


def test_the_op_runs_it(triton_backend, device, dtype):
    args = arguments(30, 24, 40, 6, dtype, device, rows=(2, 3, 5))
    check(lowrank_linear(*args, "gelu"), args, "gelu")
    told = explain("lowrank_linear", M=30, K=24, N=40, r=6, act="gelu", residual=True, dtype=dtype, device=device)
    assert told.chosen.startswith("triton.")


@pytest.mark.parametrize("act", ["none", "gelu"])
def test_opcheck(triton_backend, act, device):
    args = [arg.requires_grad_() for arg in arguments(6, 8, 10, 3, torch.float32, device)]
    torch.library.opcheck(torch.ops.vitlr.lowrank_linear.default, (*args, act))


def test_gradients(triton_backend, dtype, device):
    grads = []
    g = torch.randn(7, 10, dtype=torch.float64, device=device).to(dtype)
    for function, kind in ((lowrank_linear, dtype), (reference, dtype), (reference, torch.float64)):
        args = [arg.to(kind).requires_grad_() for arg in arguments(7, 8, 10, 3, dtype, device)]
        grads.append(torch.autograd.grad(function(*args, "gelu"), args, g.to(kind)))
    for ours, plain, exact in zip(*grads, strict=True):
        assert_close_to(ours, plain, exact)


def test_a_compiled_module(triton_backend, device):
    layer = LowRankLinear(24, 40, 6, device=device)
    x = torch.randn(2, 5, 24, device=device)
    with torch.no_grad():
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        check(y, [x, layer.down.weight, layer.up.weight, layer.up.bias, None])


def test_tiles_are_measured_once_where_the_user_asks(kernel, monkeypatch, tmp_path, device):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VITLR_AUTOTUNE", "1")
    clocked = []
    monkeypatch.setattr(tables, "_median", lambda run: (run(), clocked.append(1), len(clocked))[2])
    tables.measured.cache_clear()
    args = arguments(5, 24, 40, 6, torch.float16, device)
    try:
        for _ in range(2):
            check(kernel.run(*args, "none"), args)
        (row,) = tables.measured(kernel.KERNEL)
        assert len(clocked) > 1 and (row["M"], row["r"]) == (5, 6) and row["from"]
        kernel.Config(**row["config"])
    finally:
        tables.measured.cache_clear()
