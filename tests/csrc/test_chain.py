"""The native chains of linears, each instruction set that this CPU runs, against fp64."""

from __future__ import annotations

import os

import pytest
import torch
from instruction_sets import forced
from tolerance import assert_close_to

from vitlr.ops.backends import cpu, native
from vitlr.ops.layers import lowrank_linear, lowrank_mlp
from vitlr.ops.layers import lowrank_residual_linear as residual_linear
from vitlr.ops.layers.activations import ACTIVATIONS
from vitlr.ops.layers.codes import LARGEST, encode, groups, spread

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native extension: {native.why_not()}")

DTYPES = [torch.float32, torch.bfloat16]
# (M, K, D, N, r1, r2): one row, less than a tile, ragged everywhere, more than one chunk of K, several blocks of rows
SHAPES = [
    (1, 33, 70, 40, 5, 3),
    (5, 31, 47, 33, 7, 9),
    (13, 129, 65, 17, 16, 33),
    (63, 48, 96, 64, 32, 16),
    (197, 300, 517, 130, 65, 31),
    (1000, 64, 128, 48, 24, 40),
]


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
def isa(request, monkeypatch) -> str:
    return forced(monkeypatch, request.param)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Entries of the output that nobody writes show as NaN."""
    empty = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        return empty(self, *args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def tensor(*shape, dtype=torch.float32):
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)


def mlp(shape, dtype, form="both"):
    """(x, B1, A1, b1, B2, A2, b2, residual)."""
    M, K, D, N, r1, r2 = shape
    every = [(M, K), (r1, K), (D, r1), (D,), (r2, D), (N, r2), (N,), (M, N)]
    args = [tensor(*size, dtype=dtype) for size in every]
    if form == "first":
        args[4:6] = [tensor(N, D, dtype=dtype), None]
    if form == "second":
        args[1:3] = [tensor(D, K, dtype=dtype), None]
    if form == "dense":
        args[1:3], args[4:6] = [tensor(D, K, dtype=dtype), None], [tensor(N, D, dtype=dtype), None]
    if form == "bare":
        args[3] = args[6] = args[7] = None
    return args


def check(run, reference, args, *rest):
    doubled = (arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args)
    exact = reference(*doubled, *rest)
    assert_close_to(run(*args, *rest), reference(*args, *rest), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mlp(isa, threads, shape, dtype):
    check(cpu._mlp, lowrank_mlp.reference, mlp(shape, dtype), "gelu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["first", "second", "dense", "bare"])
def test_forms(isa, form, dtype):
    check(cpu._mlp, lowrank_mlp.reference, mlp(SHAPES[2], dtype, form), "gelu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(isa, threads, shape, dtype):
    M, K, _, N, r, _ = shape
    args = [tensor(*size, dtype=dtype) for size in ((M, K), (r, K), (N, r), (N,), (M, N))]
    check(cpu._linear, lowrank_linear.reference, args, "silu")
    check(cpu._linear, lowrank_linear.reference, [*args[:3], None, None], "none")


def curve(act, x):
    """act(x) for a vector x, through a chain: an identity of one column and one row."""
    one = torch.ones(1, 1, dtype=x.dtype)
    return cpu._linear(x[:, None], one, one, None, None, act)[:, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(isa, act, dtype):
    x = torch.cat([torch.linspace(-20, 20, 8001), torch.tensor([1e-30, -1e-4, 88.0, -88.0, -104.0, 1e4, -1e4])]).to(
        dtype
    )
    exact = ACTIVATIONS[act][0](x.double())
    y = curve(act, x)
    near = exact.abs() < 8  # the largest value must not hide the error of all others
    assert_close_to(y[near], ACTIVATIONS[act][0](x)[near], exact[near])
    assert_close_to(y, ACTIVATIONS[act][0](x), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_and_inf_pass_as_in_torch(isa, act, dtype):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0]).to(dtype)
    expected = ACTIVATIONS[act][0](x.double())  # in fp32, gelu(inf) depends on torch's back-end
    y = curve(act, x)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_stay_in_their_rows(isa, dtype):
    """And an Inf in a ragged width does not become NaN by what fills the tile."""
    args = mlp((30, 37, 45, 19, 5, 7), dtype)
    for i in (1, 2, 4, 5):
        args[i] = args[i].abs()
    args[0][3, 5], args[0][11, 36] = torch.nan, torch.inf
    y = cpu._mlp(*args, "relu")
    assert y[3].isnan().all() and y[11].isinf().all()
    assert torch.isfinite(y[[m for m in range(30) if m not in (3, 11)]]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(isa, dtype):
    x, *args = mlp((21, 50, 70, 34, 9, 8), dtype)
    whole = cpu._mlp(x, *args, "gelu")
    nan = torch.full_like(x, torch.nan)
    layouts = {
        "transposed": x.mT.contiguous().mT,
        "every second column": torch.stack([x, nan], 2).flatten(1)[:, ::2],
        "rows apart": torch.cat([x, nan], 1)[:, :50],
        "unaligned": torch.cat([nan[0, :1], x.flatten()])[1:].view(21, 50),
    }
    for name, other in layouts.items():
        assert torch.equal(cpu._mlp(other, *args, "gelu"), whole), name
    args = [a if a is None or a.dim() < 2 else torch.cat([a.mT, a.mT], 1).mT[: len(a)] for a in args]
    assert torch.equal(cpu._mlp(x, *args, "gelu"), whole)  # weights and residual in other strides
    args[-1] = args[-1].mT.contiguous().mT
    assert torch.equal(cpu._mlp(x, *args, "gelu"), whole)


def test_expanded_rows_and_batches(isa):
    args = mlp((1, 24, 40, 16, 6, 5), torch.float32)
    one = cpu._mlp(*args[:7], None, "gelu")
    many = cpu._mlp(args[0].expand(4, 25, 24), *args[1:7], None, "gelu")
    assert many.shape == (4, 25, 16) and torch.equal(many, one.expand(4, 25, 16))


@pytest.mark.parametrize("rows", [(), (0,), (0, 3)], ids=str)
def test_no_and_one_row(isa, rows):
    args = mlp((1, 24, 40, 16, 6, 5), torch.float32)
    y = cpu._mlp(torch.randn(*rows, 24), *args[1:7], None, "gelu")
    assert y.shape == (*rows, 16) and not y.isnan().any()


def test_threads_do_not_change_the_result(isa):
    args, results = mlp((331, 60, 90, 50, 20, 12), torch.float32), []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(cpu._mlp(*args, "gelu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def residual_layer(M, K, N, r, group, form, dtype):
    W = tensor(N, K)
    scale = (W.abs().max() / LARGEST[form] * (0.75 + torch.rand(N, groups(K, group)) / 2)).to(dtype)
    codes = encode(W / spread(scale.float(), group, K), form)
    return (
        tensor(M, K, dtype=dtype),
        tensor(r, K, dtype=dtype),
        tensor(N, r, dtype=dtype),
        codes,
        scale,
        tensor(N, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize(
    ("M", "K", "N", "r", "group"),
    [
        (5, 33, 17, 3, 8),
        (63, 130, 70, 9, 32),
        (197, 257, 129, 33, 64),
        (40, 301, 33, 1, 7),
        (4, 20, 9, 2, 1),
        (4, 20, 9, 2, 64),
    ],
)
def test_residual_linear(isa, threads, form, M, K, N, r, group, dtype):
    args = residual_layer(M, K, N, r, group, form, dtype)
    check(cpu._residual_linear, residual_linear.reference, args, form, group)


def test_peak_is_no_fantasy(isa):
    """A product of ours cannot be faster than multiply-adds between registers, nor a thousand times slower."""
    assert 1e8 < native.peak(torch.float32, 3) < 1e12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_works_after_a_parallel_region():
    """libgomp's threads do not follow a fork: a parallel region there would wait for ever."""
    args = mlp((331, 60, 90, 50, 20, 12), torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = cpu._mlp(*args, "gelu")
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(cpu._mlp(*args, "gelu"), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)
