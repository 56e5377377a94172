"""`W C Wᵀ` as an op: values, symmetry, schema, compilers, counters, errors."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitlr.errors import InputError
from vitlr.ops import explain
from vitlr.ops.dispatch.ceilings import Ceilings
from vitlr.ops.linalg.weighted_gram_chain import Key, roofline, weighted_gram_chain

OVERLOAD = torch.ops.vitlr.weighted_gram_chain.default
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


def problem(dtype=torch.float64, device="cpu"):
    C = torch.randn(3, 7, 7, dtype=torch.float64)
    return torch.randn(3, 5, 7, dtype=torch.float64).to(device, dtype), (C + C.mT).to(device, dtype)


@DEVICES
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str)
def test_values(dtype, eps, device):
    W, C = problem(dtype, device)
    Y = weighted_gram_chain(W, C)
    exact = torch.einsum("bij,bjk,blk->bil", W.double(), C.double(), W.double())
    assert Y.dtype == dtype and torch.equal(Y, Y.mT)
    assert (Y.double() - exact).abs().max() <= eps * exact.abs().max()
    # Lᵀ M L is the same with a transposed view.
    torch.testing.assert_close(weighted_gram_chain(W.mT.contiguous().mT, C), Y)


@DEVICES
def test_fast_math_does_not_reach_it(device):
    W, C = torch.randn(1, 64, 256, device=device), torch.eye(256, device=device)[None]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast(device, dtype=torch.bfloat16):
            Y = weighted_gram_chain(W, C)
    finally:
        torch.set_float32_matmul_precision(before)
    exact = W.double() @ W.double().mT
    assert Y.dtype == torch.float32 and (Y - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(OVERLOAD, problem(dtype))


def test_leaves_autograd_alone():
    W, C = problem()
    assert not weighted_gram_chain(W.requires_grad_(), C).requires_grad


def test_compiles_without_a_break():
    W, C = problem()
    compiled = torch.compile(lambda W, C: weighted_gram_chain(W * 2, C).diagonal(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(W, C), weighted_gram_chain(W * 2, C).diagonal())


def test_flops_are_those_of_one_product_and_one_triangle():
    with FlopCounterMode(display=False) as counter:
        weighted_gram_chain(*problem())
    count = roofline(Key(3, 5, 7, torch.float64))
    assert counter.get_total_flops() == count.flops == 3 * (2 * 5 * 7 * 7 + 5 * 6 * 7)
    assert count.bytes == 8 * 3 * (35 + 49 + 25) and count.floor_us is None
    ceilings = Ceilings("a test", 1e9, {torch.float64: 1e9})
    text = str(explain("weighted_gram_chain", b=3, m=5, k=7, ceilings=ceilings))
    assert "floor 2.6 µs" in text and "triton.chain" in text


@pytest.mark.parametrize(
    ("W", "C", "message"),
    [
        (torch.ones(5, 7), torch.ones(7, 7), r"W is \[5, 7\].*expected \[b, m, k\]"),
        (torch.ones(1, 5, 7).half(), torch.ones(1, 7, 7).half(), "float16"),
        (torch.ones(2, 5, 7), torch.ones(2, 5, 5), r"C is \[2, 5, 5\].*expected \[2, 7, 7\]"),
        (torch.ones(1, 5, 7), torch.ones(1, 7, 7).double(), "float64, expected .*float32"),
        (torch.ones(1, 5, 7), torch.ones(1, 7, 7, device="meta"), "C is on meta, W on cpu"),
    ],
)
def test_bad_input(W, C, message):
    with pytest.raises(InputError, match=message):
        weighted_gram_chain(W, C)
