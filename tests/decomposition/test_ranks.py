"""The identities of docs/method.md, checked in float64 on small matrices of every kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitlr.calibration.statistics import LayerStatistics, Statistics
from vitlr.decomposition import ranks
from vitlr.decomposition.solving import decompose
from vitlr.errors import InputError, NumericalError
from vitlr.runtime.storage import fingerprint

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31 - 1)


def random_layer(n, k, tokens, seed, gradient_tokens=None):
    """A weight, inputs and output gradients; few tokens make the moments singular."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(n, k, generator=g, dtype=torch.float64)
    X = torch.randn(tokens, k, generator=g, dtype=torch.float64) * torch.logspace(0, -2, k, dtype=torch.float64)
    D = torch.randn(gradient_tokens or tokens, n, generator=g, dtype=torch.float64)
    return W, X, D


def statistics_of(W, X, D, objective, images=1):
    n, k = W.shape
    output = n <= k
    Y, back = X @ W.T, D @ W
    layer = LayerStatistics("layer", k, n, "layer", X.shape[0])
    layer.moment = Y.T @ Y if output else X.T @ X
    layer.gradient = D.T @ D if output else back.T @ back
    layer.normalized = layer.moment / Y.square().sum()
    if len(D) == len(X):  # all tokens are of one image
        P = Y.T @ D if output else X.T @ back
        layer.image_moment, layer.image_gradient = P @ P.T, P.T @ P
    layer.input_sum = X.sum(0)
    model = nn.ModuleDict({"layer": nn.Linear(k, n, bias=False, dtype=torch.float64)})
    model["layer"].weight.data = W
    return model, Statistics({"layer": layer}, fingerprint({"layer": W}), (objective,), images=images)


def weighted_error(W, A, B, X, D):
    """‖S^{1/2}(W − A B)C^{1/2}‖²_F = Σ_{s,t} (d_sᵀ (W − A B) x_t)²."""
    return (D @ (W - A @ B) @ X.T).square().sum()


@settings(max_examples=40, deadline=None)
@given(n=sizes, k=sizes, tokens=st.integers(1, 20), seed=seeds)
def test_output_objective_is_optimal_and_its_energies_are_the_error(n, k, tokens, seed):
    W, X, D = random_layer(n, k, tokens, seed)
    model, stats = statistics_of(W, X, D, "output")
    spectrum = decompose(model, stats, "output").layers["layer"]
    best = torch.linalg.svdvals(X @ W.T).square()  # Eckart–Young for the outputs
    scale = best.sum() + 1e-30
    for rank in range(1, min(n, k) + 1):
        A, B, _ = spectrum.factors(W, rank)
        error = (X @ (W - A @ B).T).square().sum()
        assert error <= best[rank:].sum() + 1e-9 * scale
        assert abs(spectrum.errors()[rank] - error) <= 1e-9 * scale


@settings(max_examples=40, deadline=None)
@given(n=sizes, k=sizes, seed=seeds)
def test_loss_objective_is_optimal_where_gradients_have_full_rank(n, k, seed):
    W, X, D = random_layer(n, k, 30, seed)
    model, stats = statistics_of(W, X, D, "loss")
    spectrum = decompose(model, stats, "loss", damping=0.0).layers["layer"]
    best = torch.linalg.svdvals(D @ W @ X.T).square()
    scale = best.sum()
    unit = 2 * X.shape[0]  # the loss is half the square, the gradients are a mean over tokens
    for rank in range(1, min(n, k) + 1):
        A, B, _ = spectrum.factors(W, rank)
        assert weighted_error(W, A, B, X, D) <= best[rank:].sum() + 1e-7 * scale
        assert abs(spectrum.errors()[rank] * unit - best[rank:].sum()) <= 1e-7 * scale


@settings(max_examples=25, deadline=None)
@given(n=sizes, k=sizes, tokens=st.integers(1, 6), seed=seeds)
def test_singular_moments_beat_random_factors(n, k, tokens, seed):
    W, X, D = random_layer(n, k, tokens, seed, gradient_tokens=tokens)
    model, stats = statistics_of(W, X, D, "loss")
    spectrum = decompose(model, stats, "loss", damping=1e-6).layers["layer"]
    rank = max(1, min(n, k) // 2)
    A, B, _ = spectrum.factors(W, rank)
    ours = weighted_error(W, A, B, X, D)
    g = torch.Generator().manual_seed(seed + 1)
    for _ in range(5):
        Ar = torch.randn(n, rank, generator=g, dtype=torch.float64)
        Br = torch.linalg.lstsq(Ar, W).solution
        assert ours <= weighted_error(W, Ar, Br, X, D) * (1 + 1e-4) + 1e-4 * weighted_error(W, Ar * 0, Br, X, D)


@pytest.mark.parametrize("n, k", [(6, 9), (9, 6), (7, 7)])
def test_white_inputs_give_eckart_young(n, k):
    W, _, D = random_layer(n, k, 4, 0)
    model, stats = statistics_of(W, torch.eye(k, dtype=torch.float64), D, "output")
    spectrum = decompose(model, stats, "output").layers["layer"]
    sigma = torch.linalg.svdvals(W)
    torch.testing.assert_close(spectrum.energies, sigma.square(), rtol=1e-10, atol=1e-10)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    A, B, _ = spectrum.factors(W, 3)
    torch.testing.assert_close(A @ B, (U[:, :3] * s[:3]) @ Vh[:3], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("objective", ["loss", "output", "normalized", "fisher"])
@pytest.mark.parametrize("n, k", [(6, 9), (9, 6)])
def test_full_rank_gives_the_weight_back_and_ranks_are_nested(objective, n, k):
    W, X, D = random_layer(n, k, 40, 1)
    model, stats = statistics_of(W, X, D, objective)
    spectrum = decompose(model, stats).layers["layer"]
    A, B, _ = spectrum.factors(W, min(n, k))
    torch.testing.assert_close(A @ B, W, rtol=1e-8, atol=1e-8)
    eye = torch.eye(min(n, k), dtype=torch.float64)
    torch.testing.assert_close(spectrum.Q @ spectrum.P, eye, rtol=1e-8, atol=1e-8)


def test_normalized_energies_sum_to_one():
    W, X, D = random_layer(5, 8, 12, 2)
    model, stats = statistics_of(W, X, D, "normalized")
    assert float(decompose(model, stats).layers["layer"].energies.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("n, k", [(6, 9), (9, 6)])
def test_centred_error_is_never_larger_and_the_bias_carries_the_mean(n, k):
    W, X, D = random_layer(n, k, 50, 3)
    X = X + 3.0
    model, stats = statistics_of(W, X, D, "output")
    plain = decompose(model, stats, "output").layers["layer"]
    centred = decompose(model, stats, "output", centred=True).layers["layer"]
    for rank in (1, 3, 5):
        A, B, b = centred.factors(W, rank)
        error = (X @ W.T - (X @ B.T @ A.T + b)).square().sum()
        assert error == pytest.approx(float(centred.errors()[rank]), rel=1e-8)
        assert error <= plain.errors()[rank] * (1 + 1e-9)


@pytest.mark.parametrize("n, k", [(6, 9), (9, 6)])
@pytest.mark.parametrize("what", ["one token", "constant inputs", "zero weight", "zero gradient", "zero inputs"])
def test_degenerate_layers_are_solved(n, k, what):
    W, X, D = random_layer(n, k, 8, 4)
    if what == "one token":
        X, D = X[:1], D[:1]
    elif what == "constant inputs":
        X = torch.ones_like(X)
    elif what == "zero weight":
        W = torch.zeros_like(W)
    elif what == "zero gradient":
        D = torch.zeros_like(D)
    else:
        X = torch.zeros_like(X)
    model, stats = statistics_of(W, X, D, "loss")
    stats.layers["layer"].normalized = None
    for objective in ("loss", "output", "fisher"):
        stats.objectives = (objective,)
        spectrum = decompose(model, stats, objective).layers["layer"]
        assert torch.isfinite(spectrum.energies).all() and (spectrum.energies >= 0).all()
        A, B, _ = spectrum.factors(W, 2)
        assert torch.isfinite(A).all() and torch.isfinite(B).all()
        if what in ("one token", "constant inputs"):  # rank one is exact
            torch.testing.assert_close(X @ (A @ B).T, X @ W.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n, k", [(6, 9), (9, 6)])
def test_fisher_takes_the_tokens_of_an_image_together(n, k):
    """Tokens that agree count with the square of their number; where they cancel, nothing is lost."""
    W, X, D = random_layer(n, k, 1, 6)

    def total(*signs):
        model, stats = statistics_of(W, X.repeat(len(signs), 1), torch.cat([sign * D for sign in signs]), "fisher")
        return float(decompose(model, stats).layers["layer"].energies.sum())

    assert total(1.0, 1.0, 1.0) == pytest.approx(9 * total(1.0))
    assert total(1.0, -1.0) <= 1e-20 * total(1.0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("n, k", [(6, 9), (9, 6)])
@pytest.mark.parametrize("objective", ["loss", "output", "normalized"])
@pytest.mark.parametrize("field", ["moment", "gradient", "normalized"])
def test_nan_and_inf_name_the_layer(poison, n, k, objective, field):
    W, X, D = random_layer(n, k, 12, 5)
    model, stats = statistics_of(W, X, D, objective)
    getattr(stats.layers["layer"], field)[0, 0] = poison
    used = {"loss": ("moment", "gradient"), "output": ("moment",), "normalized": ("normalized",)}[objective]
    if field in used:
        with pytest.raises(NumericalError, match="layer layer"):
            decompose(model, stats, objective)
    else:
        decompose(model, stats, objective)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_a_weight_of_low_rank_is_solved_in_spite_of_float32_noise(rank):
    """H = Wᵀ S W then has empty directions, and float32 products leave noise of either sign in them."""
    W, X, D = random_layer(48, 16, 200, 7)
    W = W[:, :rank] @ torch.randn(rank, 16, dtype=torch.float64)
    model, stats = statistics_of(W, X, D, "loss")
    back = (D @ W).float()
    stats.layers["layer"].gradient = (back.T @ back).double()
    spectrum = decompose(model, stats).layers["layer"]
    A, B, _ = spectrum.factors(W, rank)
    torch.testing.assert_close(A @ B, W, rtol=1e-3, atol=1e-3)


def test_bad_options_are_refused():
    W, X, D = random_layer(6, 9, 12, 8)
    model, stats = statistics_of(W, X, D, "loss")
    for bad in ({"objective": "best"}, {"damping": -1.0}, {"damping": float("nan")}):
        with pytest.raises(InputError):
            decompose(model, stats, **bad)
    for objective in ("normalized", "fisher"):
        with pytest.raises(InputError, match="centred"):
            decompose(model, stats, objective, centred=True)


def test_wrong_objective_and_other_weights_are_refused():
    W, X, D = random_layer(6, 9, 12, 6)
    model, stats = statistics_of(W, X, D, "output")
    with pytest.raises(InputError, match="calibrate with objective"):
        decompose(model, stats, "loss")
    model["layer"].weight.data = W + 1
    with pytest.raises(InputError, match="other weights"):
        decompose(model, stats)
    with pytest.raises(InputError, match="another model"):
        decompose(nn.ModuleDict({"x": nn.Linear(3, 3)}), stats)


def several_layers(sizes=((12, 20),) * 6):
    """A model of layers `l0, l1, ...` of these sizes and their statistics."""
    layers, weights = {}, {}
    model = nn.ModuleDict()
    for i, (n, k) in enumerate(sizes):
        W, X, D = random_layer(n, k, 64, i)
        one, stats = statistics_of(W, X, D, "loss")
        layers[f"l{i}"] = stats.layers["layer"]
        layers[f"l{i}"].name = layers[f"l{i}"].owner = f"l{i}"
        model[f"l{i}"] = one["layer"]
        weights[f"l{i}"] = W
    return model, Statistics(layers, fingerprint(weights), ("loss",), images=1)


def test_threads_do_not_change_the_answer():
    model, stats = several_layers()
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(decompose(model, stats))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    for name in stats.layers:
        torch.testing.assert_close(results[0].layers[name].energies, results[1].layers[name].energies)


@pytest.fixture
def in_batches(monkeypatch):
    """Solves on the CPU as on a GPU; the list of the sizes [b, n] of the batches."""
    sizes, solve_batch = [], ranks.solve_batch

    def recorded(M, F=None):
        sizes.append(list(M.shape[:2]))
        return solve_batch(M, F)

    monkeypatch.setattr(ranks, "solve_batch", recorded)
    monkeypatch.setattr(ranks, "_one_by_one", ranks._in_batches)
    return sizes


@pytest.mark.parametrize("objective", ["loss", "output"])
def test_batches_give_the_same_answer_in_the_same_order(objective, in_batches, monkeypatch):
    model, stats = several_layers([(12, 20), (8, 8), (20, 12), (12, 12), (30, 8)])
    stats.layers["l3"].gradient.zero_()  # nothing depends on it
    seen = []
    batched = decompose(model, stats, objective, progress=lambda done, total: seen.append((done, total)))
    found = {"loss": [[1, 12], [2, 12], [2, 8]], "output": [[2, 12], [1, 12], [1, 8], [1, 8]]}[objective]
    assert in_batches == found
    assert seen == [(i, 5) for i in range(6)]
    monkeypatch.undo()
    one_by_one = decompose(model, stats, objective)
    assert list(batched.layers) == list(one_by_one.layers) == [f"l{i}" for i in range(5)]
    for name, spectrum in one_by_one.layers.items():
        W = model[name].weight.detach()
        torch.testing.assert_close(batched.layers[name].energies, spectrum.energies)
        for rank in (1, 5):
            A, B, _ = batched.layers[name].factors(W, rank)
            A1, B1, _ = spectrum.factors(W, rank)
            torch.testing.assert_close(A @ B, A1 @ B1, rtol=1e-6, atol=1e-6)


def test_batches_are_bounded(in_batches, monkeypatch):
    monkeypatch.setattr(ranks, "BATCH", 2 * 12 * 12)
    model, stats = several_layers()
    decompose(model, stats)
    assert in_batches == [[2, 12]] * 3


@pytest.mark.parametrize("field", ["moment", "gradient"])
def test_a_failure_in_a_batch_names_the_layer(field, in_batches):
    model, stats = several_layers()
    getattr(stats.layers["l4"], field)[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="layer l4"):
        decompose(model, stats)
    stats.layers["l4"] = several_layers()[1].layers["l4"]
    stats.layers["l2"].gradient.neg_()
    with pytest.raises(NumericalError, match=r"layer l2: the solve failed \(its gradient moment is not positive"):
        decompose(model, stats)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_answer():
    model, stats = several_layers([(12, 20), (8, 8), (20, 12)])
    gpu, cpu = decompose(model, stats, device="cuda"), decompose(model, stats)
    for name in stats.layers:
        torch.testing.assert_close(gpu.layers[name].energies.cpu(), cpu.layers[name].energies)
