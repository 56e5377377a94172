"""`int8_attention`: its reference, the CPU kernel on every instruction set, graphs, and what is refused."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import forced
from int8_steps import step
from tolerance import assert_close_to

from vitlr import ops
from vitlr.errors import InputError
from vitlr.ops.backends import native
from vitlr.ops.layers import int8_chain
from vitlr.ops.layers.attention import attention
from vitlr.ops.layers.int8_attention import int8_attention, reference
from vitlr.ops.layers.int8_chain import Norm, Step

needs_native = pytest.mark.skipif(not native.available(), reason=f"native extension: {native.why_not()}")
ISAS = ["portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8"]
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 8), (1, 33, 2, 15), (3, 50, 1, 32), (2, 197, 3, 64)]  # images, tokens, heads, width


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv("VITLR_BACKEND", "cpu")
    return forced(monkeypatch, request.param)


def parts(B, L, H, d, dtype=torch.float32, K=24):
    """x, qkv, proj, residual, norm."""
    x, norm = torch.randn(B, L, K).to(dtype), Norm(torch.rand(K).to(dtype), torch.randn(K).to(dtype), 1e-6)
    return x, [step(K, 3 * H * d)], [step(H * d, 17)], torch.randn(B, L, 17).to(dtype), norm


def one_after_the_other(x, qkv, proj, heads, residual, norm):
    y = int8_chain.int8_chain(x, qkv, ["none"] * len(qkv), norm=norm)
    q, k, v = y.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return int8_chain.int8_chain(attention(q, k, v), proj, ["none"] * len(proj), residual)


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_its_three_operations_one_after_the_other(isa, threads, shape, dtype):
    x, qkv, proj, residual, norm = parts(*shape, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for added, normed in ((residual, norm), (None, None)):
            y = int8_attention(x, qkv, proj, shape[2], added, normed)
            assert torch.equal(y, one_after_the_other(x, qkv, proj, shape[2], added, normed))
    finally:
        torch.set_num_threads(before)


@needs_native
def test_linears_of_low_rank_and_further_columns(isa):
    x, _, _, residual, norm = parts(2, 21, 2, 8)
    qkv, proj = [step(24, 5, 3), step(5, 48)], [step(16, 4), step(4, 17, 2)]
    y = int8_attention(x, qkv, proj, 2, residual, norm)
    assert torch.equal(y, one_after_the_other(x, qkv, proj, 2, residual, norm))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("left", [(1, 1), (3, 8), (8, 2), (5, 7), (8, 8)], ids=str)
def test_channels_of_queries_and_keys_that_are_gone_are_zeros_that_nobody_multiplies(isa, left, dtype):
    x, [full], proj, residual, norm = parts(2, 29, 2, 8, dtype)
    narrow, rows = narrowed(full, left, 8)
    gone = torch.ones(48, dtype=torch.bool).index_fill(0, rows, False)
    zeros = full._replace(codes=full.codes * ~gone[:, None], bias=full.bias * ~gone)
    y = int8_attention(x, [narrow], proj, 2, residual, norm, left)
    assert torch.equal(y, int8_attention(x, [zeros], proj, 2, residual, norm))
    args = ([*norm[:2]], [*narrow], [*proj[0]], residual, 2, list(left), norm.eps)
    assert (y - reference(x, *args)).float().norm() < 0.02 * (y - residual).float().norm() + x.numel() * eps(dtype)


def narrowed(full, left, d):
    """A step of qkv whose heads have the first so many channels of queries and keys, and which those are."""
    heads = [h * d + torch.arange(width) for h, width in enumerate(left)]
    queries, D = torch.cat(heads), len(left) * d
    rows = torch.cat([queries, D + queries, torch.arange(2 * D, 3 * D)])
    return full._replace(codes=full.codes[rows], scale=full.scale[rows], bias=full.bias[rows]), rows


def eps(dtype):
    return torch.finfo(dtype).eps


def test_the_reference_is_what_the_docstring_says():
    """With steps so fine that rounding does not count, in fp64."""
    x, norm = torch.randn(2, 7, 12).double(), [torch.rand(12).double(), torch.randn(12).double()]
    sides = [fine(12, 24), fine(8, 5)]
    y = reference(x, norm, sides[0], sides[1], None, 2, [], 1e-6)
    n = torch.nn.functional.layer_norm(x, (12,), *norm, 1e-6)
    q, k, v = dense(n, sides[0]).view(2, 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
    shares = (q @ k.mT / 2).softmax(-1)
    expected = dense((shares @ v).transpose(1, 2).flatten(2), sides[1])
    assert (y - expected).norm() < 0.05 * expected.norm()


def fine(K, N):
    W = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    scale = torch.full((N,), 1e-4).double()
    multiplier, shift = torch.full((K,), 32.0).double(), torch.full((K,), 128.0).double()
    return Step(W, scale, -scale * (W.double() @ shift), multiplier, shift)


def dense(x, one):
    return x @ (one.codes * one.scale[:, None] * one.multiplier).T


@pytest.mark.parametrize("left", [[], [3, 1]], ids=["whole", "narrow"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_opcheck(monkeypatch, backend, left):
    if backend == "cpu" and not native.available():
        pytest.skip(str(native.why_not()))
    monkeypatch.setenv("VITLR_BACKEND", backend)
    x, qkv, proj, residual, norm = parts(2, 3, 2, 4)
    first = narrowed(qkv[0], left, 4)[0] if left else qkv[0]
    args = (x, [norm.gamma, norm.beta], [*first], [*proj[0]], residual, 2, left, norm.eps)
    torch.library.opcheck(torch.ops.vitlr.int8_attention.default, args)


def test_a_gradient_is_refused():
    x, qkv, proj, _, _ = parts(1, 3, 2, 4)
    with pytest.raises(InputError, match="no gradient: layers of bytes are for running"):
        int8_attention(x.requires_grad_(), qkv, proj, 2).sum().backward()


def test_operations_are_counted():
    told = ops.explain("int8_attention", M=10, L=5, before=(8, 24), after=(8, 6), heads=2)
    assert told.roofline.flops == 2 * 10 * (8 * 24 + 8 * 6) + 4 * 10 * 5 * 8
    assert told.roofline.bytes == 4 * 10 * (8 + 6) + 8 * 24 + 8 * 6
    told = ops.explain("int8_attention", M=10, L=5, before=(8, 14), after=(8, 6), heads=2, query_keys=(2, 1))
    assert told.roofline.flops == 2 * 10 * (8 * 14 + 8 * 6) + 2 * 10 * 5 * (8 + 3)


@needs_native
def test_as_exact_as_the_reference_where_no_rounding_is_close(isa):
    """One token: attention passes v on, so that what is rounded is known."""
    x = torch.zeros(4, 1, 8)
    one, two = step(8, 24), step(8, 6)
    y, args = int8_attention(x, [one], [two], 2), ([], [*one], [*two], None, 2, [], 0.0)
    assert_close_to(y, reference(x, *args), reference(x.double(), *args))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": torch.zeros(3, 24)}, r"x is torch.float32 \[3, 24\], expected floating point \[B, L, K\]"),
        ({"qkv": []}, "qkv has 0 parts, expected codes, scale, bias, multiplier, shift, wide of each step"),
        ({"heads": 5}, "qkv puts out 48 channels, expected 3 for each entry of 5 heads"),
        ({"query_keys": (8, 16)}, "qkv puts out 48 channels, expected 1 for each entry of 2 heads beside 48 of que"),
        ({"query_keys": (4, 4, 8)}, r"query_keys is \[4, 4, 8\], expected 2 widths from 1 to 8"),
        ({"query_keys": (13, 3)}, r"query_keys is \[13, 3\], expected 2 widths from 1 to 8"),
        ({"query_keys": (16, 0)}, r"query_keys is \[16, 0\], expected 2 widths from 1 to 8"),
        ({"proj": [step(15, 17)]}, r"codes 0 are torch.int8 \[17, 15\], expected int8 \[N, 16\]"),
        ({"residual": torch.zeros(2, 5, 16)}, r"residual \[2, 5, 16\] does not fit"),
        ({"norm": Norm(torch.ones(23), torch.ones(24), 0.0)}, r"gamma is torch.float32 \[23\]"),
    ],
)
def test_what_does_not_fit_is_told(change, match):
    x, qkv, proj, residual, norm = parts(2, 5, 2, 8)
    given = {"x": x, "qkv": qkv, "proj": proj, "heads": 2, "residual": residual, "norm": norm, **change}
    with pytest.raises(InputError, match=match):
        int8_attention(**given)
