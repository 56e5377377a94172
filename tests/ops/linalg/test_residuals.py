"""Low rank plus residual: each half is optimal, the turns help, statistics are used and never do harm."""

from __future__ import annotations

import pytest
import torch

from vitlr.calibration.statistics import LayerStatistics
from vitlr.errors import InputError, NumericalError
from vitlr.ops.layers.codes import FORMS, LARGEST, dequantise, encode, spread
from vitlr.ops.linalg.residuals import Metric, fit_blocks, lowrank, quantise, solve_parts

BF16 = torch.bfloat16


def inputs(K, tokens=400):
    """Correlated inputs with one loud channel."""
    torch.manual_seed(1)
    x = torch.randn(tokens, K, dtype=torch.float64) @ torch.randn(K, K, dtype=torch.float64)
    x[:, 3] *= 8
    return x


def statistics(W, extras=(), gradient=False):
    N, K = W.shape
    x = inputs(K)
    y = x @ W.mT
    g = torch.randn(len(x), N, dtype=torch.float64) * torch.linspace(0.1, 3, N, dtype=torch.float64)
    on_output = N <= K
    return LayerStatistics(
        "layer",
        K,
        N,
        "layer",
        tokens=len(x),
        moment=y.mT @ y if on_output else x.mT @ x,
        gradient=(g.mT @ g if on_output else (g @ W).mT @ (g @ W)) if gradient else None,
        input_moment=x.mT @ x if "input_moment" in extras else None,
    )


def weight(N, K):
    torch.manual_seed(0)
    return torch.randn(N, K, dtype=torch.float64) / K**0.5


def by_inputs(K):
    x = inputs(K)
    C = x.mT @ x
    values, U = torch.linalg.eigh(C)
    return Metric(C, U * values.clamp_min(0).sqrt())


@pytest.mark.parametrize(("N", "K"), [(40, 24), (24, 40), (32, 32)])
def test_the_low_rank_part_is_the_best_of_its_rank(N, K):
    W, by = weight(N, K), by_inputs(K)
    X = W @ by.root
    for rank in (1, 5, 24):
        A, B = lowrank(W, rank, by)
        assert A.shape == (N, rank) and B.shape == (rank, K)
        best = torch.linalg.svdvals(X)[rank:].square().sum()
        assert by.error(W - A @ B) == pytest.approx(float(best), rel=1e-6, abs=1e-9 * float(X.square().sum()))


def test_both_metrics_at_once():
    W = weight(24, 32)
    by = statistics(W, ("input_moment",), gradient=True).metric(W)
    A, B = lowrank(W, 5, by)
    values, U = torch.linalg.eigh(by.S)
    best = torch.linalg.svdvals((U * values.sqrt()) @ U.mT @ W @ by.root)[5:].square().sum()
    assert by.error(W - A @ B) == pytest.approx(float(best), rel=1e-6)


def test_inputs_are_read_off_the_outputs_of_a_square_layer():
    W = weight(24, 24)
    known, guessed = statistics(W, ("input_moment",)).metric(W), statistics(W).metric(W)
    torch.testing.assert_close(guessed.C, known.C, rtol=1e-6, atol=1e-6 * float(known.C.abs().max()))
    wide = weight(16, 24)
    of_wide = statistics(wide).metric(wide)
    torch.testing.assert_close(wide @ of_wide.C @ wide.mT, statistics(wide).moment)
    assert torch.linalg.eigvalsh(of_wide.C).min() > 0


@pytest.mark.parametrize("form", LARGEST)
@pytest.mark.parametrize("group", [8, 10, 64])
def test_quantised_is_close_and_scales_are_searched(form, group):
    W = weight(30, 37)
    W[0], W[1, :5] = 0, 0
    codes, scale = quantise(W, form, group, BF16)
    R = dequantise(codes, scale.double(), form, group, 37)
    cells = torch.nn.functional.pad(W, (0, -37 % group)).unflatten(1, (-1, group))
    largest = (cells.abs().amax(-1) / LARGEST[form]).to(BF16).double().clamp_min(1e-30)
    codes = encode(W / spread(largest, group, 37), form)
    unsearched = dequantise(codes, largest, form, group, 37)
    assert scale.dtype == BF16
    assert ((W - R).square().sum(1) <= (W - unsearched).square().sum(1) * (1 + 1e-12)).all()
    assert (W - R).norm() < {"int8": 0.01, "int4": 0.16, "fp8": 0.04}[form] * W.norm()
    assert not R[0].any() and not R[1, :5].any()
    loud = torch.ones(37, dtype=torch.float64)
    loud[::5] = 100
    weighted = dequantise(*quantise(W, form, group, BF16, loud)[:1], quantise(W, form, group, BF16, loud)[1].double(),
                          form, group, 37)  # fmt: skip
    assert ((W - weighted).square() * loud).sum() <= ((W - R).square() * loud).sum() * (1 + 1e-12)


def test_blocks_are_a_least_squares_fit():
    W, by = weight(12, 24), by_inputs(24)
    plain = fit_blocks(W, 8, Metric())
    assert torch.equal(torch.block_diag(*plain), W * (torch.block_diag(*torch.ones(3, 4, 8)) > 0))
    fitted = fit_blocks(W, 8, by)
    x = inputs(24)
    for block in range(3):
        rows, columns = slice(4 * block, 4 * block + 4), slice(8 * block, 8 * block + 8)
        want = torch.linalg.lstsq(x[:, columns], x @ W[rows].mT).solution.mT
        torch.testing.assert_close(fitted[block], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("N", "K"), [(48, 24), (24, 24), (24, 48)])
def test_statistics_never_do_harm_and_turns_help(N, K, form):
    W = weight(N, K)
    stats = statistics(W)
    by = stats.metric(W)
    plain, ours = solve_parts(W, 4, form, 8, BF16), solve_parts(W, 4, form, 8, BF16, stats)
    one = solve_parts(W, 4, form, 8, BF16, stats, rounds=1)

    def error(parts):
        scale = None if parts.scale is None else parts.scale.double()
        R = dequantise(parts.codes, scale, form, 8, K).double()
        return by.error(W - parts.A.double() @ parts.B.double() - R)

    assert {t.dtype for t in (ours.A, ours.B)} == {BF16}
    assert ours.error == pytest.approx(error(ours), rel=1e-9)
    assert error(ours) <= error(plain) and ours.error <= one.error
    # These inputs are far from white; the outputs of a wide layer tell only a part of that.
    assert error(ours) < (0.95 if N >= K else 1) * error(plain)
    if form != "blockdiag":
        codes, scale = quantise(W, form, 8, BF16)
        assert error(ours) < 0.8 * by.error(W - dequantise(codes, scale.double(), form, 8, K))


def test_a_layer_that_nothing_depends_on():
    W = weight(24, 32)
    stats = statistics(W, ("input_moment",), gradient=True)
    stats.gradient.zero_()
    stats.input_moment.zero_()
    assert solve_parts(W, 4, "int8", 8, BF16, stats).error >= 0


def test_what_does_not_fit():
    W = weight(24, 32)
    with pytest.raises(InputError, match="layer are of a layer 24x32, the weight is 24x16"):
        solve_parts(W[:, :16], 4, "int8", 8, BF16, statistics(W))
    with pytest.raises(InputError, match="hold no moment"):
        bare = statistics(W)
        bare.moment = None
        solve_parts(W, 4, "int8", 8, BF16, bare)
    broken = statistics(W)
    broken.moment[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="its moment holds NaN"):
        solve_parts(W, 4, "int8", 8, BF16, broken)
    W[0, 0] = float("inf")
    with pytest.raises(NumericalError, match=r"weight .* holds NaN or Inf"):
        solve_parts(W, 4, "int8", 8, BF16)
