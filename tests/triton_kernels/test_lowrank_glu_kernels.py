"""The gated MLP kernel: packed and split, low-rank and dense."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tolerance import assert_close_to

from vitlr import ops
from vitlr.ops.layers.activations import ACTIVATIONS
from vitlr.ops.layers.lowrank_glu import lowrank_glu, reference
from vitlr.triton_kernels import lowrank_glu as kernel
from vitlr.triton_kernels import tables, targets
from vitlr.triton_kernels.targets import TARGETS, Unsupported

SM_90, BF16 = TARGETS["sm_90"], torch.bfloat16
# M, K, D, N, rg, rv, r2, packed
SHAPES = {
    "packed": (63, 100, 150, 70, 40, 40, 20, True),
    "packed, even": (128, 64, 64, 64, 32, 32, 16, True),
    "split": (197, 48, 70, 40, 24, 20, 12, False),
    "two parts": (20, 40, 64, 32, 48, 80, 96, False),
    "wide ranks, packed": (20, 64, 40, 32, 144, 144, 192, True),
    "dense": (65, 70, 100, 40, None, None, 20, False),
    "one row": (1, 40, 70, 24, 20, 12, 9, False),
}


def arguments(M, K, D, N, rg, rv, r2, packed, dtype, device, bias=True):
    """x and what the op takes after it, seeded; packed: one B, and A and b are halves of one tensor."""
    torch.manual_seed(0)

    def make(*shape):
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype).to(device)

    b = make(2 * D)
    gate = [make(D, K), None, b[:D]] if rg is None else [make(rg, K), make(D, rg), b[:D]]
    value = [make(D, K), None, b[D:]] if rv is None else [make(rv, K), make(D, rv), b[D:]]
    if packed:
        A = make(2 * D, rg)
        gate[1], value[0], value[1] = A[:D], gate[0], A[D:]
    x, residual = (torch.randn(M, width).to(dtype).to(device) for width in (K, N))
    args = [x, *gate, *value, make(r2, D), make(N, r2), make(N), residual]
    if not bias:
        args[3] = args[6] = args[9] = args[10] = None
    return args


def check(run, args, act="silu"):
    y = run(*args, act)
    exact = reference(*(None if arg is None else arg.double() for arg in args), act)
    assert y.is_contiguous()
    assert_close_to(y, reference(*args, act), exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype, device, poison):
    poison(kernel)
    check(kernel.run, arguments(*SHAPES[shape], dtype, device))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act, dtype, device, poison):
    poison(kernel)
    check(kernel.run, arguments(20, 40, 70, 24, 20, 20, 12, True, dtype, device, bias=False), act)


def test_any_strides_and_no_rows(device, poison):
    poison(kernel)
    args = arguments(30, 40, 70, 24, 20, 12, 8, False, torch.float16, device)
    args[10] = None
    args[1:] = [arg.mT.contiguous().mT if arg is not None and arg.dim() == 2 else arg for arg in args[1:]]
    args[0] = torch.randn(2, 40, 15, device=device).to(torch.float16).transpose(1, 2)
    check(kernel.run, args)
    args[0] = args[0][:0]
    assert kernel.run(*args, "silu").shape == (0, 15, 24)


def test_nan_and_inf_stay_in_their_row(device):
    args = arguments(9, 40, 70, 24, 20, 12, 8, False, torch.float32, device)
    args[0][2, 3], args[0][5, 7] = float("nan"), float("inf")
    y, expected = kernel.run(*args, "silu"), reference(*args, "silu")
    assert torch.equal(y.isfinite(), expected.isfinite())


def test_through_the_op(device, triton_backend):
    args = [arg.requires_grad_() for arg in arguments(6, 16, 20, 12, 8, 6, 4, False, torch.float32, device)]
    torch.library.opcheck(torch.ops.vitlr.lowrank_glu.default, (*args, "silu"))
    got = torch.autograd.grad(lowrank_glu(*args).square().sum(), args, allow_unused=True)
    want = torch.autograd.grad(reference(*args).square().sum(), args, allow_unused=True)
    torch.testing.assert_close(got, want)
    shape = {"M": 6, "K": 16, "D": 20, "N": 12, "rg": 8, "rv": 6, "r2": 4, "device": device}
    assert ops.explain("lowrank_glu", **shape).chosen == "triton.row_block"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r2": None}, "fc2 is dense"),
        ({"rg": None}, "one of gate and value is dense"),
        ({"rv": 257}, "rv=257, ranks are held in registers"),
        ({"target": targets.INTERPRETER}, "bfloat16"),
        ({"target": dataclasses.replace(SM_90, shared_memory=16 * 1024)}, "no tiles fit"),
    ],
)
def test_what_is_not_taken(change, message):
    sizes = {"M": 197, "K": 768, "D": 2048, "N": 768, "rg": 128, "rv": 128, "r2": 128, "shared": True}
    with pytest.raises(Unsupported, match=message):
        kernel.row_block(**{**sizes, "dtype": BF16, "target": SM_90, **change})


def test_tiles_come_from_the_table():
    config = kernel.row_block(12608, 768, 2048, 768, 128, 128, 128, True, BF16, SM_90)
    found = tables.nearest("lowrank_glu", SM_90, BF16, BM=128, r=128, rg=128, rv=128)
    assert dataclasses.asdict(config) == dict(found)
    assert kernel.row_block(12608, 768, 2048, 768, None, None, 128, False, BF16, SM_90).BD == 32  # a row of its own


def test_masks_beside_wide_sums_get_more_threads():
    config = kernel.row_block(197, 1536, 4096, 1536, 208, 208, 208, True, torch.bfloat16, TARGETS["sm_90"])
    assert (config.BM, config.BD, config.num_warps) == (64, 32, 8)
