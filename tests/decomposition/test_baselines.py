"""The published methods: each against its paper's own formulas, written out with the inverses that ours avoids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitlr.calibration.statistics import LayerStatistics, Statistics
from vitlr.decomposition.baselines import BASELINES, svd_llm_factors
from vitlr.errors import InputError, NumericalError
from vitlr.runtime.storage import fingerprint

IMAGES, TOKENS = 5, 40
SHAPES = [(12, 8), (8, 12), (9, 9), (1, 6), (6, 1)]  # (N, K): wide, tall, square, one output, one input


def make(seed: int = 0, shapes: list[tuple[int, int]] = SHAPES) -> tuple[nn.ModuleDict, Statistics, dict[str, Tensor]]:
    """Independent layers with anisotropic, not centred inputs, and the statistics that calibration would sum up."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({f"l{i}": nn.Linear(k, n, dtype=torch.float64) for i, (n, k) in enumerate(shapes)})
    layers, inputs = {}, {}
    for name, linear in model.items():
        k, n = linear.in_features, linear.out_features
        X = torch.randn(TOKENS, k, dtype=torch.float64) @ torch.randn(k, k, dtype=torch.float64) + 0.7
        Y = X @ linear.weight.detach().mT
        C = X.mT @ X
        layers[name] = LayerStatistics(
            name, k, n, name, TOKENS, moment=Y.mT @ Y if n <= k else C, input_sum=X.sum(0),
            input_moment=C, input_abs=X.abs().sum(0), row_gradient=torch.rand(n, dtype=torch.float64),
        )  # fmt: skip
        inputs[name] = X
    return (
        model,
        Statistics(layers, fingerprint({name: linear.weight for name, linear in model.items()}), images=IMAGES),
        inputs,
    )


def weighting(method: str, layer: LayerStatistics) -> tuple[Tensor, Tensor]:
    """D [N, N] and R [K, K] of the norm `||D (W - W_r) R||_F` that each paper minimises, per image."""
    D, R = torch.eye(layer.out_features).double(), torch.eye(layer.in_features).double()
    if method == "asvd":
        R = torch.diag((layer.input_abs / TOKENS).sqrt() + 1e-6)
    elif method == "fwsvd":
        D = torch.diag((layer.row_gradient / IMAGES).sqrt())
    elif method == "svd_llm":
        R = torch.linalg.cholesky(layer.input_moment / IMAGES)
    elif method == "afm":
        mean = layer.input_sum / TOKENS
        R = torch.linalg.cholesky((layer.input_moment - TOKENS * torch.outer(mean, mean)) / IMAGES)
    return D, R


@pytest.mark.parametrize("method", BASELINES)
def test_every_rank_is_the_papers_truncation(method: str) -> None:
    model, stats, _ = make()
    spectra = BASELINES[method](model, stats)
    assert spectra.fingerprint == stats.fingerprint and spectra.objective == method
    assert list(spectra.layers) == list(stats.layers) and spectra.centred == (method == "afm")
    for name, layer in stats.layers.items():
        spectrum, W = spectra.layers[name], model[name].weight.detach()
        D, R = weighting(method, layer)
        U, S, Vh = torch.linalg.svd(D @ W @ R, full_matrices=False)
        assert spectrum.max_rank == layer.size
        for r in range(1, layer.size + 1):
            published = torch.linalg.inv(D) @ (U[:, :r] * S[:r]) @ Vh[:r] @ torch.linalg.inv(R)
            A, B, _ = spectrum.factors(W, r)
            torch.testing.assert_close(A @ B, published, rtol=1e-8, atol=1e-8)
            loss = (D @ (W - A @ B) @ R).square().sum()
            torch.testing.assert_close(spectrum.errors()[r], loss, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", BASELINES)
def test_no_random_factors_beat_it_in_its_own_norm(method: str) -> None:
    model, stats, _ = make(1, [(12, 8)])
    layer, W = stats.layers["l0"], model["l0"].weight.detach()
    D, R = weighting(method, layer)
    spectrum = BASELINES[method](model, stats).layers["l0"]
    A, B, _ = spectrum.factors(W, 3)
    best = float(spectrum.errors()[3])
    for scale in (1e-3, 1e-2, 1e-1, 1.0):
        near = (A + scale * torch.randn_like(A)) @ (B + scale * torch.randn_like(B))
        assert (D @ (W - near) @ R).square().sum() > best


def test_afm_bias_is_the_papers() -> None:
    model, stats, inputs = make(2)
    spectra = BASELINES["afm"](model, stats)
    for name, linear in model.items():
        X, W, b = inputs[name], linear.weight.detach(), linear.bias.detach()
        Y = X @ W.mT + b
        mean = Y.mean(0)
        _, U = torch.linalg.eigh((Y - mean).mT @ (Y - mean) / TOKENS)
        for r in range(1, stats.layers[name].size + 1):
            Ur = U[:, -r:]
            mimicked = (Y - mean) @ Ur @ Ur.mT + mean
            A, B, bias = spectra.layers[name].factors(W, r, b)
            torch.testing.assert_close(X @ (A @ B).mT + bias, mimicked, rtol=1e-8, atol=1e-8)


def test_svd_llm_chain_gives_the_spectrum() -> None:
    model, stats, _ = make(3)
    spectra = BASELINES["svd_llm"](model, stats)
    for name, layer in stats.layers.items():
        W = model[name].weight.detach()
        for r in range(1, layer.size + 1):
            A, B = svd_llm_factors(W, layer.input_moment, r)
            assert A.shape == (layer.out_features, r) and B.shape == (r, layer.in_features)
            mine = spectra.layers[name].factors(W, r)
            torch.testing.assert_close(A @ B, mine[0] @ mine[1], rtol=1e-8, atol=1e-8)


def test_they_agree_where_the_data_say_nothing() -> None:
    """C = I, |x| = 1 and equal rows: everything but AFM is Eckart-Young; AFM too where the inputs have mean 0."""
    model, stats, _ = make(4)
    for layer in stats.layers.values():
        layer.input_moment = TOKENS * torch.eye(layer.in_features).double()
        layer.moment = layer.input_moment
        layer.input_abs = torch.full((layer.in_features,), float(TOKENS)).double()
        layer.row_gradient = torch.ones(layer.out_features).double()
        layer.input_sum = torch.zeros(layer.in_features).double()
    products = {}
    for method, solve in BASELINES.items():
        spectra = solve(model, stats)
        products[method] = []
        for name, linear in model.items():
            A, B, _ = spectra.layers[name].factors(linear.weight, min(3, stats.layers[name].size))
            products[method].append(A @ B)
    for method in BASELINES:
        torch.testing.assert_close(products[method], products["svd"], rtol=1e-5, atol=1e-5)


def test_singular_input_moment_is_shifted_as_published() -> None:
    model, stats, _ = make(5, [(12, 8)])
    layer, W = stats.layers["l0"], model["l0"].weight.detach()
    X = torch.randn(3, 8, dtype=torch.float64)  # fewer tokens than channels: rank 3
    layer.moment = layer.input_moment = 1e6 * X.mT @ X
    A, B, _ = BASELINES["svd_llm"](model, stats).layers["l0"].factors(W, 3)
    relative = ((W - A @ B) @ X.mT).square().sum() / (W @ X.mT).square().sum()
    assert relative < 1e-8
    A, B = svd_llm_factors(W, torch.zeros(8, 8).double(), 2)
    assert torch.isfinite(A).all() and torch.isfinite(B).all()


@pytest.mark.parametrize("gradient", [torch.zeros(12), torch.cat([torch.zeros(6), torch.ones(6)])])
def test_fwsvd_survives_rows_without_gradient(gradient: Tensor) -> None:
    model, stats, _ = make(6, [(12, 8)])
    stats.layers["l0"].row_gradient = gradient.double()
    spectrum, W = BASELINES["fwsvd"](model, stats).layers["l0"], model["l0"].weight.detach()
    A, B, _ = spectrum.factors(W, 8)
    torch.testing.assert_close(A @ B, W, rtol=1e-6, atol=1e-6)
    kept = gradient > 0
    A, B, _ = spectrum.factors(W, 6)  # as many ranks as rows that matter
    torch.testing.assert_close((A @ B)[kept], W[kept], rtol=1e-6, atol=1e-6)


def test_zero_weights_and_progress() -> None:
    model, stats, _ = make(7)
    for linear in model.values():
        linear.weight.data.zero_()
    stats.fingerprint = fingerprint({name: linear.weight for name, linear in model.items()})
    for method, solve in BASELINES.items():
        seen = []
        spectra = solve(model, stats, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert seen == [(i + 1, len(SHAPES)) for i in range(len(SHAPES))]
        for name in model:
            A, B, _ = spectra.layers[name].factors(model[name].weight, 1)
            assert (A @ B).abs().max() == 0, method


@pytest.mark.parametrize(
    ("method", "key"),
    [("asvd", "input_abs"), ("fwsvd", "row_gradient"), ("svd_llm", "input_moment"), ("afm", "input_moment")],
)
def test_missing_extras_are_named(method: str, key: str) -> None:
    model, stats, _ = make(8, [(6, 9)])
    setattr(stats.layers["l0"], key, None)
    with pytest.raises(InputError, match=rf"l0.*{key}"):
        BASELINES[method](model, stats)


def test_other_weights_and_nan_are_refused() -> None:
    model, stats, _ = make(9)
    with pytest.raises(InputError, match="other weights"):
        BASELINES["svd"](make(10)[0], stats)
    with pytest.raises(InputError, match="no linear layer"):
        BASELINES["svd"](nn.ModuleDict({"other": nn.Linear(2, 2)}), stats)
    stats.layers["l1"].input_moment[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="l1"):
        BASELINES["svd_llm"](model, stats)
    with pytest.raises(NumericalError, match="NaN"):
        svd_llm_factors(torch.ones(3, 2).double(), torch.full((2, 2), torch.inf).double(), 1)
