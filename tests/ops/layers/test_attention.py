"""The op `attention`: its reference, gradients, refusals, and the CPU kernel on every instruction set."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from instruction_sets import forced
from tolerance import assert_close_to

from vitlr import ops
from vitlr.errors import InputError
from vitlr.ops.backends import native
from vitlr.ops.layers.attention import Key, attention, reference, roofline

needs_native = pytest.mark.skipif(not native.available(), reason=f"native extension: {native.why_not()}")
# (B, H, L, S, d): one key, less than a tile, ragged everywhere, odd widths, more keys than one chunk of words
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 5, 24),
    (1, 2, 33, 17, 15),
    (2, 1, 7, 48, 64),
    (1, 2, 197, 197, 64),
    (1, 1, 30, 257, 33),
    (1, 1, 13, 600, 300),
]


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16", "amx_int8"])
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv("VITLR_BACKEND", "cpu")
    return forced(monkeypatch, request.param)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Entries of the output that nobody writes show as NaN."""
    empty = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        return empty(self, *args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def qkv(B, H, L, S, d, dtype=torch.float32):
    """As timm has them: views of one packed tensor where there are as many queries as keys."""
    torch.manual_seed(0)
    if L == S:
        return torch.randn(B, L, 3, H, d).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return tuple(torch.randn(B, H, rows, d).to(dtype) for rows in (L, S, S))


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_exact_as_torch(isa, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in SHAPES:
            args = qkv(*shape, dtype=dtype)
            assert_close_to(attention(*args), reference(*args), reference(*(x.double() for x in args)))
    finally:
        torch.set_num_threads(before)


def biases(q, k):
    """What positions add: shared by images, or not, with keys out of sight, shared by heads, by queries, by keys."""
    B, H, L, S = *q.shape[:3], k.shape[2]
    each = torch.randn(B, H, L, S, dtype=q.dtype)
    seen = (torch.arange(L)[:, None] - torch.arange(S)).abs() < 5  # one key of the first row at least
    yield each[:1]
    yield each.masked_fill(~seen, -torch.inf)
    yield each[:, :1].transpose(2, 3).contiguous().transpose(2, 3)  # whose rows are not contiguous
    yield each[:1, :1, :1]
    yield each[..., :1].expand(B, H, L, S)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_a_bias_of_positions_as_exact_as_torch(isa, dtype):
    for shape in SHAPES[:-1]:
        args = qkv(*shape, dtype=dtype)
        for bias in biases(*args[:2]):
            whole = bias.double().expand(*shape[:4])
            exact = reference(*(x.double() for x in args), whole)
            got = attention(*args, bias)
            assert_close_to(got, reference(*args, whole.to(dtype)), exact)
            plain = attention(*args)
            assert shape[3] == 1 or bias.stride(-1) == 0 or not torch.allclose(got, plain, rtol=0.01)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_that_sees_no_key_gets_zeros_and_a_nan_stays_where_it_is(isa, dtype):
    q, k, v = qkv(1, 2, 21, 37, 16, dtype=dtype)
    bias = torch.zeros(1, 2, 21, 37, dtype=dtype)
    bias[0, 1, 4] = -torch.inf
    bias[0, 0, 6, 36] = torch.nan
    y, plain = attention(q, k, v, bias), attention(q, k, v)
    assert (y[0, 4, 16:] == 0).all() and torch.isnan(y[0, 6, :16]).all()
    assert torch.equal(reference(q, k, v, bias)[0, 4, 16:], y[0, 4, 16:])
    untouched = torch.ones(21, 32, dtype=torch.bool)
    untouched[4, 16:] = untouched[6, :16] = False
    assert_close_to(y[0][untouched], plain[0][untouched], reference(*(x.double() for x in (q, k, v)))[0][untouched])


@needs_native
def test_strides_and_alignment(isa):
    q, k, v = qkv(2, 3, 37, 37, 24)
    expected = attention(*(x.contiguous() for x in (q, k, v)))
    assert torch.equal(attention(q, k, v), expected)
    columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]  # rows that are not contiguous
    assert torch.equal(attention(*columns), expected)
    shifted = [torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape) for x in (q, k, v)]
    assert torch.equal(attention(*shifted), expected)
    one_head = [x[:, :1].expand(-1, 3, -1, -1) for x in (q, k, v)]
    assert torch.equal(attention(*one_head), attention(*(x.contiguous() for x in one_head)))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_and_what_is_not_finite(isa, dtype):
    q, k, v = (x.clone() for x in qkv(1, 2, 21, 37, 16, dtype=dtype))
    q[0, 1, 4] *= 1000  # one share is 1, the others 0
    exact = reference(q.double(), k.double(), v.double())
    assert_close_to(attention(q, k, v), reference(q, k, v), exact)
    q[0, 0, 3, 5] = torch.nan
    v[0, 1, 7, 2] = torch.inf
    y = attention(q, k, v)
    assert (
        torch.isnan(y[0, 3, :16]).all() and torch.isfinite(y[0, :3, :16]).all() and torch.isfinite(y[0, 4:, :16]).all()
    )
    assert not torch.isfinite(y[0, :, 16 + 2]).any() and torch.isfinite(y[0, :, 16 + 3 :]).all()


@needs_native
def test_opcheck_and_gradients(monkeypatch):
    monkeypatch.setenv("VITLR_BACKEND", "cpu")
    args = [x.clone().requires_grad_() for x in qkv(2, 2, 5, 9, 8)]
    monkeypatch.undo()  # the poison is NaN, which opcheck would compare
    monkeypatch.setenv("VITLR_BACKEND", "cpu")
    bias = torch.randn(1, 2, 5, 9)
    bias[..., 3, 4] = bias[0, 1, 2] = -torch.inf
    weights = torch.randn(2, 5, 16)
    for given in (args, [*args, bias.requires_grad_()], [*args, torch.randn(2, 1, 1, 9, requires_grad=True)]):
        torch.library.opcheck(torch.ops.vitlr.attention.default, (*given, *[None] * (4 - len(given))))
        ours = torch.autograd.grad((attention(*given) * weights).sum(), given)
        theirs = torch.autograd.grad((reference(*given) * weights).sum(), given)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_its_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*qkv(1, 2, 5, 5, 8)).dtype == torch.bfloat16


@needs_native
@pytest.mark.skipif(native.best_isa() == "portable", reason="without AVX2 nothing is chosen")
def test_chosen_for_a_vit_and_not_for_a_handful_of_tokens(monkeypatch):
    monkeypatch.delenv("VITLR_BACKEND", raising=False)
    for dtype in (torch.float32, torch.bfloat16):
        assert ops.explain("attention", M=12 * 197, S=197, d=64, dtype=dtype).chosen == "cpu"
    told = ops.explain("attention", M=3 * 50, S=50, d=16)
    assert told.chosen == "torch" and "a call costs more" in str(told)
    told = ops.explain("attention", M=100_000, S=5, d=64)
    assert told.chosen == "torch" and "below 32 keys" in str(told)
    assert "it takes fp32 and bf16" in str(ops.explain("attention", M=10, S=5, d=16, dtype=torch.float64))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5, 8), (2, 5, 8), (2, 5, 8)), "expected"),
        (((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 5, 8)), "do not fit"),
        (((1, 2, 5, 8), (1, 3, 5, 8), (1, 3, 5, 8)), "do not fit"),
        (((1, 2, 5, 8), (1, 2, 5, 9), (1, 2, 5, 9)), "do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, message):
    with pytest.raises(InputError, match=message):
        attention(*(torch.zeros(shape) for shape in shapes))
    fitting = [torch.zeros(1, 2, size, 8) for size in (5, 6, 6)]
    for size in ((2, 5, 6), (1, 2, 5, 1), (1, 3, 5, 6), (2, 2, 5, 6)):
        with pytest.raises(InputError, match=r"bias .* does not fit"):
            attention(*fitting, torch.zeros(size))
    with pytest.raises(InputError, match=r"bias is torch\.bfloat16"):
        attention(*fitting, torch.zeros(1, 2, 5, 6, dtype=torch.bfloat16))
    with pytest.raises(InputError, match=r"k is torch\.float64"):
        attention(torch.zeros(1, 1, 2, 2), *(torch.zeros(1, 1, 2, 2, dtype=torch.float64) for _ in range(2)))


def test_roofline_counts_both_products():
    assert roofline(Key(12 * 197, 197, 64)).flops == 4 * 12 * 197 * 197 * 64


@needs_native
def test_from_many_threads_and_in_a_fork(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("VITLR_BACKEND", "cpu")
    inputs = [qkv(1 + i % 3, 2, 20 + i, 20 + i, 16) for i in range(12)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [attention(*args) for args in inputs]
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda args: attention(*args), inputs))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        child = os.fork()
        if child == 0:  # a parallel region of two would wait for ever for a thread that only the parent has
            os._exit(0 if torch.equal(attention(*inputs[3]), expected[3]) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)
