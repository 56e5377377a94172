"""Hidden moments, and the widths that are solved from them: what is predicted is what is measured."""

import copy

import pytest
import torch
from families import MODELS, make

import vitlr
from vitlr.errors import InputError, NumericalError
from vitlr.pruning import find_mlps, narrow_mlp
from vitlr.pruning.widths import solve_widths
from vitlr.statistics import Statistics


def recorded(model: torch.nn.Module, name: str, batches: list) -> tuple[torch.Tensor, torch.Tensor]:
    """What a linear reads and returns, over all images, one row a token."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda m, args, y: seen.append((args[0].flatten(0, -2), y.flatten(0, -2)))
    )
    with torch.no_grad():
        for images, *_ in batches:
            model(images)
    handle.remove()
    return torch.cat([h for h, _ in seen]), torch.cat([y for _, y in seen])


@pytest.fixture
def double(tiny_vit, batches):
    model = tiny_vit().double()
    return model, [(images.double(), labels) for images, labels in batches]


def test_hidden_moments_are_those_of_the_hidden_neurons(double):
    model, batches = double
    stats = vitlr.calibrate(model, batches, hidden=True)
    assert stats.extras == ("hidden",)
    for name, layer in stats.layers.items():
        assert (layer.input_moment is not None) == name.endswith("fc2")
    h, _ = recorded(model, "blocks.1.mlp.fc2", batches)
    assert torch.allclose(stats.layers["blocks.1.mlp.fc2"].input_moment, h.mT @ h, rtol=1e-12)


def test_they_are_saved_merged_and_refused_like_all_sums(double, tmp_path):
    model, batches = double
    whole = vitlr.calibrate(model, batches, hidden=True)
    parts = [vitlr.calibrate(model, part, hidden=True) for part in (batches[:1], batches[1:])]
    parts[0].save(tmp_path / "s.safetensors")
    merged = Statistics.load(tmp_path / "s.safetensors").merge(parts[1])
    for name in ("blocks.0.mlp.fc2", "blocks.1.mlp.fc2"):
        assert torch.allclose(merged.layers[name].input_moment, whole.layers[name].input_moment, rtol=1e-12)
    plain = vitlr.calibrate(model, batches)
    with pytest.raises(InputError, match="extras differ"):
        plain.merge(whole)
    with pytest.raises(InputError, match=r"no hidden moments .* calibrate with hidden=True"):
        vitlr.plan(model, plain, "params:80%", method="prune")


def test_memory_is_bounded_and_models_without_mlps_are_refused(tiny_vit, batches):
    def unread():
        raise AssertionError("too late")
        yield

    with pytest.raises(InputError, match=r"2 MLPs take 262,144 bytes, more than hidden_memory=1,000"):
        vitlr.calibrate(tiny_vit(), batches, hidden=True, hidden_memory=1000)
    with pytest.raises(InputError, match=r"finds no MLP .* LayerNorm over the hidden neurons"):
        vitlr.calibrate(tiny_vit(scale_mlp_norm=True), batches, hidden=True)
    with pytest.raises(InputError, match="finds no MLP"):
        vitlr.calibrate(tiny_vit(), batches, hidden=True, include="attn")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva_giant_patch14_224", "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("objective", ["loss", "output"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_predicted_loss_is_the_measured_one(name, objective, has_bias):
    """Plain, gated in two linears and packed: `Σ δᵀ F δ` over all tokens, and the ridge's own part."""
    model, _ = make(name)
    size = MODELS[name][0]["img_size"]
    batches = [(torch.randn(4, 3, size, size, dtype=torch.float64),) for _ in range(3)]
    mlp = next(iter(find_mlps(model).values()))
    if not has_bias:
        mlp.fc2.bias = None
    stats = vitlr.calibrate(model, batches, hidden=True, objective=objective)
    spectrum = solve_widths(model, stats, ridge=1e-4)[mlp.name]
    h, y = recorded(model, spectrum.second, batches)
    for width in (3, mlp.width // 2, mlp.width - 1):
        V, bias = spectrum.weights(width)
        keep = spectrum.keep(width)
        delta = y - h[:, keep] @ V.mT - (0 if bias is None else bias)
        moved = mlp.fc2.weight.detach().clone()
        moved[:, keep] -= V
        measured = float(((delta @ spectrum.metric) * delta).sum()) / stats.images
        level = spectrum.covariance().diagonal().mean() / (1 + spectrum.ridge)
        measured += spectrum.ridge * float(level) * float(((spectrum.metric @ moved) * moved).sum())
        assert float(spectrum.errors[width]) == pytest.approx(measured, rel=1e-7)
        narrow = copy.deepcopy(model)
        narrow_mlp(find_mlps(narrow)[mlp.name], keep, weight=V, bias=bias)
        _, out = recorded(narrow, spectrum.second, batches)
        assert torch.allclose(out, y - delta, rtol=1e-9, atol=1e-9)


def test_the_second_linear_is_factorised_as_it_is_at_a_width(double):
    model, batches = double
    stats = vitlr.calibrate(model, batches, hidden=True)
    spectrum = solve_widths(model, stats)["blocks.0.mlp"]
    V, bias = spectrum.weights(48)
    solved = spectrum.second_spectrum(48)
    assert torch.equal(spectrum.second_errors(48), solved.errors())
    h, _ = recorded(model, spectrum.second, batches)
    z = h[:, spectrum.keep(48)]
    for rank in (1, 8, 20):
        A, B, _ = solved.factors(V, rank, bias)
        delta = z @ V.mT - z @ B.mT @ A.mT
        measured = float(((delta @ spectrum.metric) * delta).sum()) / stats.images
        assert float(solved.errors()[rank]) == pytest.approx(measured, rel=1e-6)


def test_without_compensation_weights_stay(double):
    model, batches = double
    stats = vitlr.calibrate(model, batches, hidden=True)
    alone = solve_widths(model, stats, compensate=False)["blocks.0.mlp"]
    better = solve_widths(model, stats)["blocks.0.mlp"]
    W, bias = alone.weights(40)
    fc2 = model.blocks[0].mlp.fc2
    assert torch.equal(W, fc2.weight[:, alone.keep(40)]) and torch.equal(bias, fc2.bias)
    assert float(better.errors[40]) < float(alone.errors[40])
    nested = [set(better.keep(width).tolist()) for width in (16, 40, 100)]
    assert nested[0] < nested[1] < nested[2]
    for width in (0, 129):
        with pytest.raises(InputError, match="expected 1 to 128"):
            better.keep(width)


def test_few_tokens_and_dead_neurons_are_no_trouble(tiny_vit):
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[:30] = 0
        model.blocks[0].mlp.fc1.bias[:30] = -20  # gelu(-20) = 0
    stats = vitlr.calibrate(model, [torch.randn(1, 3, 32, 32)], hidden=True)
    spectrum = solve_widths(model, stats)["blocks.0.mlp"]
    assert torch.isfinite(spectrum.errors).all() and float(spectrum.errors[1]) > 0
    assert float(spectrum.errors[98]) < 1e-3 * float(spectrum.errors[1])
    assert all(torch.isfinite(value).all() for value in spectrum.weights(20))


def test_bad_options_and_moments_are_refused(double):
    model, batches = double
    stats = vitlr.calibrate(model, batches, hidden=True, objective=("loss", "normalized"))
    with pytest.raises(InputError, match="normalized"):
        solve_widths(model, stats, "normalized")
    for ridge in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="ridge"):
            solve_widths(model, stats, ridge=ridge)
    stats.layers["blocks.1.mlp.fc2"].input_moment[3, 3] = float("nan")
    with pytest.raises(NumericalError, match=r"blocks\.1\.mlp"):
        solve_widths(model, stats)


def test_widths_and_ranks_speak_of_one_unit_when_tokens_are_taken_together(double):
    """Dropping every neuron loses what the output's moment, seen over tokens, weighs in the metric of the ranks."""
    model, batches = double
    stats = vitlr.calibrate(model, batches, hidden=True, objective=("loss", "fisher"), samples=2)
    name = "blocks.1.mlp.fc2"
    layer, W = stats.layers[name], model.get_submodule(name).weight.detach()
    share = [(layer.image_gradient, 0.5), (layer.gradient, 0.5)]
    F = sum(part / part.trace() * weight for part, weight in share)
    F = F * layer.image_gradient.trace() / (2 * stats.images * 2)  # half the mean of ||P||^2 over images and draws
    F = F + 0.1 * F.trace() / len(F) * torch.eye(len(F), dtype=F.dtype)
    M = layer.input_moment / layer.moment.trace()
    found = solve_widths(model, stats, "fisher", compensate=False)["blocks.1.mlp"]
    assert torch.allclose(found.errors[0], torch.trace(F @ W @ M @ W.mT), rtol=1e-6)
    for objective in ("loss", "fisher"):
        plan = vitlr.plan(model, stats, "params:70%", method="joint", objective=objective, rank_step=4, width_step=4)
        assert plan.objective == objective and plan.narrowed
        assert vitlr.cost.count_params(vitlr.apply(model, plan)) == plan.params_kept
    with pytest.raises(InputError, match="weighs whole images"):
        solve_widths(model, stats, "normalized")
