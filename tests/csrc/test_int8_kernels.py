"""The native chains of integers, each instruction set that this CPU runs, against fp64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from instruction_sets import forced
from int8_steps import columns, normal_and_unambiguous, step, unambiguous
from tolerance import assert_close_to

from vitlr.errors import InputError
from vitlr.ops.backends import cpu_int8, native
from vitlr.ops.layers import int8_chain as op
from vitlr.ops.layers.activations import ACTIVATIONS

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native extension: {native.why_not()}")

DTYPES = [torch.float32, torch.bfloat16]
ISAS = ["portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8"]
# (M, K, N): one row, less than a tile, ragged, half a panel, more than one chunk of K, several blocks of rows
SHAPES = [(1, 33, 70), (5, 31, 47), (13, 129, 17), (33, 64, 32), (63, 1100, 40), (197, 300, 130), (1000, 64, 48)]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch) -> str:
    return forced(monkeypatch, request.param)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded_and_poisoned(monkeypatch):
    """Entries of the output that nobody writes show as NaN."""
    torch.manual_seed(0)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *args: empty(self, *args).fill_(torch.nan))


def run(x, steps, acts, residual=None):
    return cpu_int8._chain(x, *columns(steps), residual, acts)


def check(x, steps, acts, residual=None):
    exact = op.reference(x.double(), *columns(steps), None if residual is None else residual.double(), acts)
    assert_close_to(run(x, steps, acts, residual), op.reference(x, *columns(steps), residual, acts), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_step(isa, threads, shape, dtype):
    M, K, N = shape
    one = step(K, N)
    x = unambiguous(M, one, dtype)
    check(x, [one], ["none"])
    check(x, [one], ["gelu"], torch.randn(M, N).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("more", [1, 3, 20, 64])
@pytest.mark.parametrize("shape", [(1, 33, 70), (13, 129, 17), (197, 192, 64)], ids=str)
def test_channels_with_further_columns(isa, threads, shape, more, dtype):
    M, K, N = shape
    one = step(K, N, more)
    check(unambiguous(M, one, dtype), [one], ["none"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize("shape", [(1, 1, 7), (5, 31, 47), (33, 64, 32), (197, 300, 130)], ids=str)
def test_a_norm_before_the_first_step(isa, threads, shape, more, dtype):
    M, K, N = shape
    one, eps = step(K, N, more), 1e-5
    gamma, beta = (0.5 + torch.rand(K)).to(dtype), torch.randn(K).to(dtype)
    x = normal_and_unambiguous(M, one, gamma, beta, eps, dtype)
    norm = ([gamma, beta], eps)
    exact = op.reference(x.double(), *columns([one]), None, ["none"], [gamma.double(), beta.double()], eps)
    y = cpu_int8._chain(x, *columns([one]), None, ["none"], *norm)
    assert_close_to(y, op.reference(x, *columns([one]), None, ["none"], *norm), exact)
    apart = torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, :K]
    for other in (apart, x.mT.contiguous().mT):
        assert torch.equal(cpu_int8._chain(other, *columns([one]), None, ["none"], *norm), y)


def test_a_row_that_is_constant_is_normalised_to_beta(isa):
    one, beta = step(40, 8), torch.randn(40)
    y = cpu_int8._chain(torch.full((3, 40), 7.0), *columns([one]), None, ["none"], [torch.ones(40), beta], 1e-6)
    torch.testing.assert_close(y, run(beta.expand(3, 40), [one], ["none"]))


@pytest.mark.parametrize("more", [1, 20, 64])
@pytest.mark.parametrize("widths", [(33, 70, 21), (64, 129, 80), (192, 768, 192)], ids=str)
def test_further_columns_are_written_by_the_step_before(isa, threads, widths, more):
    K, D, N = widths
    steps = [step(K, D, more), step(D, N, more)]
    x, residual = torch.randn(197, K), torch.randn(197, N)
    y = run(run(x, steps[:1], ["gelu"]), steps[1:], ["none"], residual)
    assert torch.equal(run(x, steps, ["gelu", "none"], residual), y)


@pytest.mark.parametrize("wrong", [[0, 40], [-1, 3], [5, 3]], ids=str)
def test_channels_that_are_not_there_are_told(wrong):
    one = step(40, 8, 2)._replace(wide=torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(InputError, match="wide is no rising list of channels from 0 to 39"):
        run(torch.randn(3, 40), [one], ["none"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(isa, act, dtype):
    one = step(70, 45)
    one = one._replace(scale=8 * one.scale, bias=8 * one.bias)
    check(unambiguous(50, one, dtype), [one], [act])


def test_sums_are_exact_where_they_are_largest(isa):
    """All products 255 * ±127 over the longest K: no sum saturates, and none is rounded but at the end."""
    K = op.LIMIT
    W = torch.full((3, K), 127, dtype=torch.int8)
    W[1], W[2, ::2] = -127, -127
    W[2, 0] = -126
    plain = op.Step(W, torch.ones(3), torch.zeros(3), torch.ones(K), torch.zeros(K))
    y = run(torch.full((2, K), 300.0), [plain], ["none"])
    assert torch.equal(y, torch.tensor([255.0 * 127 * K, -255.0 * 127 * K, 255.0]).expand(2, 3))


def test_every_pair_of_bytes_is_multiplied_right(isa):
    q, w = torch.arange(256.0)[:, None], torch.arange(-128, 128, dtype=torch.int8)[:, None]
    plain = op.Step(w, torch.ones(256), torch.zeros(256), torch.ones(1), torch.zeros(1))
    assert torch.equal(run(q, [plain], ["none"]), q * w.float().T)


def test_rounding_is_to_nearest_even_and_clamps_and_a_nan_is_zero(isa):
    x = torch.tensor([-1e9, -0.6, 0.5, 1.5, 2.5, 2.51, 254.4, 255.4, 1e9, torch.inf, -torch.inf, torch.nan])
    plain = op.Step(torch.ones(1, 1, dtype=torch.int8), *(torch.ones(1), torch.zeros(1)) * 2)
    y = run(x[:, None], [plain], ["none"])[:, 0]
    assert y.tolist() == [0, 0, 0, 2, 2, 3, 254, 255, 255, 255, 0, 0]


@pytest.mark.parametrize("act", ["none", "gelu"])
@pytest.mark.parametrize("widths", [(33, 70, 21), (64, 129, 17, 80), (300, 517, 130)], ids=str)
def test_a_chain_is_its_steps_one_after_the_other(isa, threads, widths, act):
    steps = [step(K, N) for K, N in pairwise(widths)]
    acts = [act] * (len(steps) - 1) + ["none"]
    x, residual = torch.randn(197, widths[0]), torch.randn(197, widths[-1])
    y = x
    for one, f in zip(steps[:-1], acts, strict=False):
        y = run(y, [one], [f])
    assert torch.equal(run(x, steps, acts, residual), run(y, steps[-1:], acts[-1:], residual))


def test_a_chain_in_bf16_keeps_what_lies_between_steps_finer_than_torch(isa):
    steps = [step(64, 129), step(129, 40)]
    check(unambiguous(100, steps[0], torch.bfloat16), steps, ["gelu", "none"])


def test_instruction_sets_agree(isa, monkeypatch):
    """Sums are exact, so that only the last bits of what follows may differ."""
    one = step(300, 96)
    x = unambiguous(50, one)
    y = run(x, [one], ["none"])
    monkeypatch.setenv("VITLR_CPU_ISA", "portable")
    torch.testing.assert_close(y, run(x, [one], ["none"]), rtol=1e-6, atol=1e-6)


def test_strides(isa):
    one = step(50, 34)
    x = unambiguous(21, one)
    whole, nan = run(x, [one], ["gelu"]), torch.full_like(x, torch.nan)
    layouts = {
        "transposed": x.mT.contiguous().mT,
        "every second column": torch.stack([x, nan], 2).flatten(1)[:, ::2],
        "rows apart": torch.cat([x, nan], 1)[:, :50],
        "unaligned": torch.cat([nan[0, :1], x.flatten()])[1:].view(21, 50),
    }
    for name, other in layouts.items():
        assert torch.equal(run(other, [one], ["gelu"]), whole), name
    twisted = op.Step(one.codes.mT.contiguous().mT, *(torch.stack([t, t], 1)[:, 0] for t in one[1:5]))
    assert torch.equal(run(x, [twisted], ["gelu"]), whole)
    residual = torch.randn(34, 21).mT
    assert torch.equal(run(x, [one], ["none"], residual), run(x, [one], ["none"], residual.contiguous()))


@pytest.mark.parametrize("rows", [(), (0,), (0, 3), (4, 25)], ids=str)
def test_any_number_of_leading_dimensions(isa, rows):
    one, row = step(24, 16), torch.randn(24)
    y = run(row.expand(*rows, 24), [one], ["none"])
    assert y.shape == (*rows, 16)
    assert torch.equal(y, run(row, [one], ["none"]).expand(*rows, 16))


def test_threads_do_not_change_the_result(isa):
    steps, results = [step(60, 90), step(90, 50)], []
    x, before = torch.randn(331, 60), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(run(x, steps, ["gelu", "none"]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_codes_that_change_are_packed_again(isa):
    one = step(40, 32)
    x = unambiguous(9, one)
    before = run(x, [one], ["none"])
    one.codes.neg_()
    flipped = one._replace(codes=one.codes.clone())
    assert torch.equal(run(x, [one], ["none"]), run(x, [flipped], ["none"])) and not torch.equal(
        before, run(x, [one], ["none"])
    )
