"""The MLP kernel: one launch, few rows shared by several programs, a dense fc1, a dense fc2 in two steps."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tolerance import assert_close_to

from vitlr import ops
from vitlr.errors import InputError
from vitlr.nn import LowRankLinear, LowRankMLP
from vitlr.ops.backends.triton.lowrank_mlp import row_block_floor, split_floor
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.ceilings import H200
from vitlr.ops.layers.activations import ACTIVATIONS
from vitlr.ops.layers.lowrank_mlp import Key, lowrank_mlp, reference
from vitlr.triton_kernels import lowrank_mlp as kernel
from vitlr.triton_kernels import tables, targets
from vitlr.triton_kernels.targets import TARGETS, Unsupported

SM_90, BF16 = TARGETS["sm_90"], torch.bfloat16


def arguments(M, K, D, N, r1, r2, dtype, device, bias=True, residual=True):
    """x and what the op takes after it, seeded."""
    torch.manual_seed(0)

    def make(*shape):
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype).to(device)

    first = (make(D, K), None) if r1 is None else (make(r1, K), make(D, r1))
    second = (make(N, D), None) if r2 is None else (make(r2, D), make(N, r2))
    x = torch.randn(M, K).to(dtype).to(device)
    last = torch.randn(M, N).to(dtype).to(device) if residual else None
    return [x, *first, make(D) if bias else None, *second, make(N) if bias else None, last]


def exact(args, act):
    return reference(*(None if arg is None else arg.double() for arg in args), act)


def check(run, args, act="gelu"):
    y = run(*args, act)
    assert y.is_contiguous()
    assert_close_to(y, reference(*args, act), exact(args, act))


SHAPES = {
    "even": (128, 64, 128, 64, 32, 16),
    "one row": (1, 40, 70, 24, 20, 12),
    "ragged": (63, 100, 150, 70, 40, 20),
    "tokens of an image": (197, 48, 96, 40, 24, 48),
    "two parts": (20, 64, 130, 32, 48, 80),
    "wide ranks": (20, 64, 72, 32, 192, 144),
    "dense fc1": (65, 70, 100, 40, None, 20),
}


@pytest.mark.parametrize("run", [kernel.run, kernel.run_split], ids=["row_block", "split"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, run, dtype, device, poison):
    poison(kernel)
    check(run, arguments(*SHAPES[shape], dtype, device))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act, dtype, device, poison):
    poison(kernel)
    check(kernel.run, arguments(20, 40, 70, 24, 20, 12, dtype, device, bias=False, residual=False), act)


def test_any_strides(device, poison):
    poison(kernel)
    x, *rest = arguments(30, 40, 70, 24, 20, 12, torch.float16, device)
    transposed = [None if arg is None or arg.dim() < 2 else arg.mT.contiguous().mT for arg in rest]
    rest = [arg if new is None else new for arg, new in zip(rest, transposed, strict=True)]
    rest[2] = torch.stack([rest[2], rest[2]], 1)[:, 0]  # b1, every second element
    wide = torch.randn(2, 3, 5, 80, device=device).to(torch.float16)[..., ::2]
    rest[6] = torch.randn(2, 3, 5, 24, device=device).to(torch.float16).transpose(0, 0)
    check(kernel.run, [wide, *rest])
    rest[6] = None
    check(kernel.run, [torch.randn(2, 40, 15, device=device).to(torch.float16).transpose(1, 2), *rest])
    check(kernel.run_split, [x[:1].expand(9, 40), *rest])


@pytest.mark.parametrize("run", [kernel.run, kernel.run_split])
def test_no_rows(run, device):
    args = arguments(0, 40, 70, 24, 20, 12, torch.float32, device)
    assert run(*args, "gelu").shape == (0, 24)
    args[0], args[7] = args[0].reshape(3, 0, 40), None
    assert run(*args, "gelu").shape == (3, 0, 24)


@pytest.mark.parametrize("run", [kernel.run, kernel.run_split])
def test_nan_and_inf_stay_in_their_row(run, device):
    args = arguments(9, 40, 70, 24, 20, 12, torch.float32, device)
    clean = run(*args, "relu")
    args[0][2, 3], args[0][5, 7] = float("nan"), float("inf")
    y = run(*args, "relu")
    expected = reference(*args, "relu")
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    others = [row for row in range(9) if row not in (2, 5)]
    assert torch.equal(y[others], clean[others])


def test_the_same_result_every_time(device):
    args = arguments(40, 64, 500, 24, 20, 12, torch.float16, device)
    assert torch.equal(kernel.run_split(*args, "gelu"), kernel.run_split(*args, "gelu"))


def few_processors(monkeypatch, sms):
    monkeypatch.setattr(targets, "INTERPRETER", dataclasses.replace(targets.INTERPRETER, sms=sms))
    registry._chosen.clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="chooses by the processors of the interpreter's target")
@pytest.mark.parametrize(("sms", "name"), [(1, "triton.row_block"), (132, "triton.split")])
def test_through_the_op(sms, name, device, monkeypatch, triton_backend):
    few_processors(monkeypatch, sms)
    args = arguments(197, 40, 512, 24, 20, 12, torch.float16, device)
    shape = {"M": 197, "K": 40, "D": 512, "N": 24, "r1": 20, "r2": 12, "residual": True, "dtype": torch.float16}
    assert ops.explain("lowrank_mlp", **shape).chosen == name
    check(lowrank_mlp, args)


def test_opcheck_and_gradients(device, triton_backend):
    args = [arg.requires_grad_() for arg in arguments(6, 16, 20, 12, 8, 4, torch.float32, device)]
    torch.library.opcheck(torch.ops.vitlr.lowrank_mlp.default, (*args, "gelu"))
    got = torch.autograd.grad(lowrank_mlp(*args).square().sum(), args)
    want = torch.autograd.grad(reference(*args).square().sum(), args)
    torch.testing.assert_close(got, want)


def test_a_compiled_module(device, triton_backend):
    from timm.layers import Mlp

    mlp = Mlp(16, 24).eval()
    mlp.fc1, mlp.fc2 = LowRankLinear.from_linear(mlp.fc1, 4), LowRankLinear.from_linear(mlp.fc2, 4)
    fused, x = LowRankMLP(mlp).to(device), torch.randn(2, 5, 16, device=device)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fused.fc2(fused.act(fused.fc1(x))))


def test_a_dense_fc2_runs_in_two_steps(device, dtype, triton_backend):
    args = arguments(30, 40, 70, 24, 20, None, dtype, device)
    check(lowrank_mlp, args)
    shape = {"M": 30, "K": 40, "D": 70, "N": 24, "r1": 20, "r2": None, "dtype": dtype, "device": device}
    told = ops.explain("lowrank_mlp", **shape)
    assert told.chosen == "triton.two_steps"
    assert "fc2 is dense" in {row.candidate: row.why for row in told.rows}["triton.row_block"]


def test_two_steps_say_why_not(triton_backend):
    with pytest.raises(InputError, match="two_steps: fc1 must be low-rank and fc2 dense"):
        lowrank_mlp(*arguments(3, 40, 70, 24, None, None, torch.float32, "cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r2": None}, "fc2 is dense: its sums would be 768 wide"),
        ({"r1": 257}, "r1=257, ranks are held in registers and taken up to 256"),
        ({"r2": 300}, "r2=300"),
        ({"dtype": torch.float64}, "float64"),
        ({"target": targets.INTERPRETER, "dtype": BF16}, "bfloat16"),
        ({"target": dataclasses.replace(SM_90, shared_memory=16 * 1024)}, "no tiles fit the 16384 bytes"),
    ],
)
@pytest.mark.parametrize("variant", [kernel.row_block, kernel.split])
def test_what_is_not_taken(variant, change, message):
    sizes = {"M": 197, "K": 768, "D": 3072, "N": 768, "r1": 128, "r2": 128, "dtype": BF16, "target": SM_90, **change}
    with pytest.raises(Unsupported, match=message):
        variant(**sizes)


def test_tiles_come_from_the_table_and_shrink_with_the_memory():
    row = kernel.row_block(12608, 768, 3072, 768, 128, 128, BF16, SM_90)
    assert dataclasses.asdict(row).items() >= tables.nearest("lowrank_mlp", SM_90, BF16, BM=128, r=128, r1=128).items()
    dense, low = (kernel.row_block(12608, 768, 3072, 768, r1, 256, BF16, SM_90) for r1 in (None, 256))
    assert (dense.BD, low.BD) == (32, 64)  # a dense fc1 has rows of its own
    assert kernel.row_block(12608, 768, 3000, 768, 128, 128, BF16, SM_90).BD == 64  # masks take registers
    small = dataclasses.replace(SM_90, shared_memory=100 * 1024)
    config = kernel.row_block(12608, 768, 3072, 768, 128, 128, BF16, small)
    assert kernel.shared_memory(config, 128, 128, BF16) <= 100 * 1024 < kernel.shared_memory(row, 128, 128, BF16)


@pytest.mark.parametrize(
    ("M", "BM", "share"),
    [(197, 64, 4 / 132), (1576, 64, 25 / 132), (12608, 128, 99 / 132), (50432, 128, 394 / 396), (16897, 64, 265 / 396)],
)
def test_whole_waves(M, BM, share):
    config = kernel.row_block(M, 768, 3072, 768, 128, 128, BF16, SM_90)
    programs = kernel.tiles(M, config)
    assert config.BM == BM and programs / (132 * math.ceil(programs / 132)) == pytest.approx(share)
    time = {BM: BM * math.ceil(math.ceil(M / BM) / 132) for BM in (64, 128)}
    assert time[config.BM] == min(time.values())


def test_few_rows_share_the_hidden_width():
    assert kernel.split(197, 768, 3072, 768, 128, 128, BF16, SM_90).splits == 16
    assert kernel.split(1576, 768, 3072, 768, 128, 128, BF16, SM_90).splits == 4
    with pytest.raises(Unsupported, match="M=12608, D=3072: the row blocks fill the processors"):
        kernel.split(12608, 768, 3072, 768, 128, 128, BF16, SM_90)


def test_floors():
    key = Key(12608, 768, 3072, 768, 128, 128, dtype=BF16)
    products = row_block_floor(key._replace(act="relu"), H200, SM_90)
    assert products == pytest.approx(31.4 * 132 / 99, abs=0.1)  # three quarters of the processors have a row block
    assert row_block_floor(key._replace(r1=64, r2=64), H200, SM_90) > 0.6 * products  # GELU, not products
    few = key._replace(M=1576)
    assert split_floor(few, H200, SM_90) < row_block_floor(few, H200, SM_90)


def test_autotune_measures_once(device, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VITLR_AUTOTUNE", "1")
    tables.measured.cache_clear()
    seen = []
    monkeypatch.setattr(tables, "_median", lambda function: seen.append(function()) or len(seen))
    monkeypatch.setattr(
        kernel, "configs", lambda *_: [kernel.Config(64, 32, 32, 32, 4, 2), kernel.Config(64, 64, 32, 32, 4, 2)]
    )
    args = arguments(9, 32, 64, 32, 16, 16, torch.float16, device)
    for _ in range(2):
        check(kernel.run, args)
    assert len(seen) == 2 and len(tables.measured("lowrank_mlp")) == 1
    tables.measured.cache_clear()


def test_masks_beside_wide_sums_get_more_threads():
    config = kernel.row_block(197, 768, 3072, 768, 208, 208, torch.bfloat16, TARGETS["sm_90"])
    assert (config.BM, config.BD, config.num_warps) == (64, 32, 8)
