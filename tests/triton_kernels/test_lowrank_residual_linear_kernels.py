"""`y = A (B x) + R x + b` by Triton: values, strides, ragged tiles, what is refused."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close_to

from vitlr.errors import InputError
from vitlr.ops import candidates, explain
from vitlr.ops.dispatch.ceilings import H200
from vitlr.ops.layers.codes import code_shape, dequantise, encode, groups, spread
from vitlr.ops.layers.lowrank_residual_linear import Key, lowrank_residual_linear, reference
from vitlr.triton_kernels import lowrank_residual_linear as kernels
from vitlr.triton_kernels.targets import TARGETS, Unsupported

RUNS = {"one": kernels.run_one_pass, "two": kernels.run_two_pass}
# form, K, N, r, group_size: no tile, and no power of two, divides them
SHAPES = [
    ("int8", 96, 40, 24, 32),
    ("int8", 100, 70, 48, 100),
    ("int4", 51, 40, 5, 64),
    ("int4", 80, 33, 16, 16),
    ("fp8", 64, 70, 17, 64),
    ("blockdiag", 60, 48, 20, 20),
    ("blockdiag", 48, 70, 8, 24),
]


def parts(form, K, N, r, group, dtype, device, bias=True):
    torch.manual_seed(0)
    B, A, b = torch.randn(r, K) / K**0.5, torch.randn(N, r) / r**0.5, torch.randn(N)
    if form == "blockdiag":
        R, scale = torch.randn(code_shape(form, N, K, group)) / group**0.5, None
        R = R.to(dtype)
    else:
        scale = (torch.rand(N, groups(K, group)) + 0.5).to(dtype) * (0.02 if form == "int8" else 0.1)
        R = encode(torch.randn(N, K) / K**0.5 / spread(scale.float(), group, K), form)
    B, A, b = B.to(dtype), A.to(dtype), b.to(dtype) if bias else None
    return [None if t is None else t.to(device) for t in (B, A, R, scale, b)]


def exact(x, B, A, R, scale, b, form, group):
    dense = dequantise(R, None if scale is None else scale.double(), form, group, x.shape[-1]).double()
    y = x.double() @ (A.double() @ B.double() + dense).mT
    return y if b is None else y + b.double()


def check(run, x, args, form, group):
    assert_close_to(run(x, *args, form, group), reference(x, *args, form, group), exact(x, *args, form, group))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("form", "K", "N", "r", "group"), SHAPES)
def test_values(form, K, N, r, group, run, dtype, device, poison):
    poison(kernels)
    args = parts(form, K, N, r, group, dtype, device, bias=N != 70)
    check(RUNS[run], torch.randn(67, K, device=device).to(dtype), args, form, group)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("M", [1, 63, 197])
def test_ragged_rows(M, run, dtype, device, poison):
    poison(kernels)
    args = parts("int8", 64, 48, 8, 32, dtype, device)
    check(RUNS[run], torch.randn(M, 64, device=device).to(dtype), args, "int8", 32)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("form", ["int8", "int4", "blockdiag"])
def test_strides(form, run, dtype, device, poison):
    poison(kernels)
    K, N, r, group = 48, 36, 10, 16
    B, A, R, scale, b = parts(form, K, N, r, group, dtype, device)
    B, A = B.mT.contiguous().mT, A.repeat_interleave(2, 1)[:, ::2]
    R = R.repeat_interleave(3, -1)[..., ::3]
    b = b.repeat_interleave(2)[::2]
    scale = None if scale is None else scale.mT.contiguous().mT
    for x in (
        torch.randn(2, K, 3, 5).permute(0, 2, 3, 1),
        torch.randn(7, 2 * K)[:, ::2],
        torch.randn(1, K).expand(5, K),
        torch.randn(K),
        torch.randn(2, 3, 4, K),
    ):
        check(RUNS[run], x.to(device, dtype), (B, A, R, scale, b), form, group)


@pytest.mark.parametrize("run", RUNS)
def test_no_rows(run, dtype, device):
    args = parts("int8", 32, 20, 4, 32, dtype, device)
    for rows in [(0,), (0, 7), (2, 0)]:
        y = RUNS[run](torch.zeros(*rows, 32, dtype=dtype, device=device), *args, "int8", 32)
        assert y.shape == (*rows, 20)


@pytest.mark.parametrize("run", RUNS)
def test_nan_and_inf_stay_in_their_rows(run, dtype, device):
    x, args = torch.randn(20, 40, device=device).to(dtype), parts("int8", 40, 24, 5, 64, dtype, device)
    x[3, 7], x[5, 0], x[6, 39] = float("nan"), float("inf"), -float("inf")
    y, plain = RUNS[run](x, *args, "int8", 64), reference(x, *args, "int8", 64)
    for row in range(20):
        if row == 3:
            assert y[row].isnan().all() and plain[row].isnan().all()
        elif row in (5, 6):
            both = ~y[row].isnan() & ~plain[row].isnan()
            assert not y[row].isfinite().any() and torch.equal(y[row][both], plain[row][both])
        else:
            assert y[row].isfinite().all()


def test_every_fp8_code(dtype, device):
    """A row of R for every code, times 1: each must come out exactly, the two NaN as NaN."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    x, scale = torch.ones(1, 1, dtype=dtype, device=device), torch.ones(256, 1, dtype=dtype, device=device)
    y = RUNS["one"](x, torch.zeros_like(x), torch.zeros_like(scale), codes, scale, None, "fp8", 64)
    want = dequantise(codes, scale, "fp8", 64, 1).mT
    assert int(want.isnan().sum()) == 2
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("form", ["int8", "blockdiag"])
def test_through_the_op(form, device, triton_backend, monkeypatch):
    K, N, r, group, dtype = 48, 36, 10, 16, torch.float32
    calls = []
    real = kernels.run_one_pass
    monkeypatch.setattr(kernels, "run_one_pass", lambda *args: calls.append(args) or real(*args))
    args = [torch.randn(2, 5, K, device=device), *parts(form, K, N, r, group, dtype, device)]
    check(lowrank_residual_linear, args[0], args[1:], form, group)
    assert len(calls) == 1
    torch.library.opcheck(torch.ops.vitlr.lowrank_residual_linear.default, (*args, form, group))
    leaves = [t.detach().clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in args]
    ours = torch.autograd.grad(
        lowrank_residual_linear(*leaves, form, group).square().sum(), [t for t in leaves if _needs(t)]
    )
    plain = torch.autograd.grad(reference(*leaves, form, group).square().sum(), [t for t in leaves if _needs(t)])
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def _needs(tensor):
    return tensor is not None and tensor.requires_grad


def test_rank_decides_the_variant(device, triton_backend):
    def chosen(r):
        shape = {"M": 70, "K": 256, "N": 256, "form": "int8", "group_size": 64, "dtype": torch.float16}
        return explain("lowrank_residual_linear", r=r, device=device, ceilings=H200, **shape)

    assert chosen(32).chosen == "triton.one_pass" and chosen(200).chosen == "triton.two_pass"
    assert "two_pass takes any rank" in str(chosen(200))
    floors = {row.candidate: row.floor_us for row in chosen(32).rows if row.floor_us is not None}
    assert {"torch", "triton.one_pass", "triton.two_pass"} <= floors.keys()
    assert all(us >= chosen(32).roofline.floor_us for us in floors.values())


def test_one_pass_pays_until_a_launch_is_cheaper(device):
    one = next(c for c in candidates("lowrank_residual_linear") if c.name == "triton.one_pass")

    def key(M):
        return Key(M, 768, 3072, 32, "int8", 64, dtype=torch.float16, device=device)

    assert one.worth(key(197)) is None and one.worth(key(None)) is None
    assert "T again for every tile along N: 1" in one.worth(key(12608))


SM80, SM90 = TARGETS["sm_80"], TARGETS["sm_90"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "x is torch.float64, taken are fp32, fp16, bf16"),
        ({"r": 129}, "r = 129, T beside Y leaves registers for r <= 128; two_pass"),
        ({"r": 65, "target": SM80}, "r <= 64"),
        ({"r": 0}, "r=0, taken are sizes of at least 1"),
        ({"group_size": 24}, "group_size 24, taken are multiples of 16 and one group a row"),
        ({"form": "int3"}, "form 'int3', taken are int8, int4, fp8 and blockdiag"),
        ({"dtype": torch.bfloat16, "target": kernels.target_of(torch.device("cpu"))}, "bfloat16"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one case asks for the interpreter")
def test_what_is_refused(change, reason):
    given = {"M": 64, "K": 768, "N": 768, "r": 32, "form": "int8", "group_size": 64, "dtype": torch.float16}
    assert kernels.one_pass(**given, target=SM90)
    with pytest.raises(Unsupported, match=reason):
        kernels.one_pass(**{**given, "target": SM90, **change})


def test_refusals_reach_the_user(device, triton_backend):
    args = parts("int8", 64, 20, 4, 24, torch.float32, device)
    with pytest.raises(InputError, match="group_size 24, taken are multiples of 16"):
        lowrank_residual_linear(torch.randn(3, 64, device=device), *args, "int8", 24)


def test_tiles_by_shape():
    def tile(**change):
        given = {"M": 12608, "K": 768, "N": 768, "r": 32, "form": "int8", "group_size": 64, "dtype": torch.bfloat16}
        return kernels.one_pass(**{**given, "target": SM90, **change})

    assert (tile().BM, tile().BN, tile().BK) == (128, 128, 64)
    assert tile(M=None) == tile() and tile(M=1).BM == 16
    assert tile(group_size=32).BK == 32 and tile(group_size=48).BK == 16 and tile(group_size=768).BK == 64
    assert tile(dtype=torch.float32).BM == 32
    for target in TARGETS.values():  # also those without rows of their own
        taken = kernels.shared_memory(tile(target=target), 32, "int8", 2, target)
        assert taken <= target.shared_memory and tile(target=target).BM >= 64
    assert kernels.tiles(12608, 768, 768, "int8", 64, tile()) == 99 * 6
    assert kernels.tiles(12608, 768, 768, "blockdiag", 192, tile()) == 99 * 4 * 2  # none lies across two blocks


def test_tuning_keeps_what_it_finds(monkeypatch, tmp_path, device):
    from vitlr.triton_kernels import tables

    monkeypatch.setenv("VITLR_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tables.measured.cache_clear()
    timed = []
    monkeypatch.setattr(tables, "_median", lambda function: timed.append(function()) or 1.0)
    monkeypatch.setattr(kernels, "configs", lambda *args: [kernels.Config(16, 64, 16, 4, 2)])
    args = parts("int8", 32, 20, 4, 32, torch.float32, device)
    check(RUNS["one"], torch.randn(3, 32, device=device), args, "int8", 32)
    assert tables.measured(kernels.KERNEL)[0]["config"]["BM"] == 16 and len(timed) == 1
    check(RUNS["one"], torch.randn(3, 32, device=device), args, "int8", 32)
    assert len(timed) == 1  # once a shape
    tables.measured.cache_clear()
