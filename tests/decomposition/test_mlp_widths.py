"""Hidden moments, and the widths that are solved from them: what is predicted is what is measured."""

import copy

import pytest
import torch
from families import MODELS, make
from solved import solved

import vitlr
from vitlr.calibration.statistics import BY_IMAGE_HIDDEN, Statistics
from vitlr.decomposition.options import Decomposition
from vitlr.decomposition.ranked_widths import spread
from vitlr.errors import InputError, NumericalError
from vitlr.measuring.losses import image_seeds, sampled_losses
from vitlr.pruning import find_mlps, narrow_mlp


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
    plain = vitlr.calibrate(model, batches, hidden=False)
    with pytest.raises(InputError, match="extras differ"):
        plain.merge(whole)
    with pytest.raises(InputError, match=r"no hidden moments .* calibrate with hidden=True"):
        vitlr.plan(model, plain, "params:80%", method="widths")


def test_memory_is_bounded_and_models_without_mlps_are_refused(tiny_vit, batches):
    def unread():
        raise AssertionError("too late")
        yield

    with pytest.raises(InputError, match=r"2 MLPs take 262,144 bytes, more than hidden_memory=1,000"):
        vitlr.calibrate(tiny_vit(), batches, objective="loss", hidden=True, hidden_memory=1000)
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
    spectrum = solved(model, stats, "mlp", ridge=1e-4)[mlp.name]
    h, y = recorded(model, spectrum.second, batches)
    for width in (3, mlp.width // 2, mlp.width - 1):
        V, bias = spectrum.weights(width)
        keep = spectrum.keep(width)
        delta = y - h[:, keep] @ V.mT - (0 if bias is None else bias)
        moved = mlp.fc2.weight.detach().clone()
        moved[:, keep] -= V
        measured = float(((delta @ spectrum.metric) * delta).sum()) / stats.images
        level = spectrum.moments.covariance().diagonal().mean() / (1 + spectrum.moments.ridge)
        measured += spectrum.moments.ridge * float(level) * float(((spectrum.metric @ moved) * moved).sum())
        assert float(spectrum.errors[width]) == pytest.approx(measured, rel=1e-7)
        narrow = copy.deepcopy(model)
        narrow_mlp(find_mlps(narrow)[mlp.name], keep, weight=V, bias=bias)
        _, out = recorded(narrow, spectrum.second, batches)
        assert torch.allclose(out, y - delta, rtol=1e-9, atol=1e-9)


def test_the_second_linear_is_factorised_as_it_is_at_a_width(double):
    model, batches = double
    stats = vitlr.calibrate(model, batches, objective="loss", hidden=True)
    spectrum = solved(model, stats, "mlp")["blocks.0.mlp"]
    V, bias = spectrum.weights(48)
    second = spectrum.second_spectrum(48)
    assert torch.equal(spectrum.rank_errors(spectrum.second, 48), second.errors())
    h, _ = recorded(model, spectrum.second, batches)
    z = h[:, spectrum.keep(48)]
    for rank in (1, 8, 20):
        A, B, _ = second.factors(V, rank, bias)
        delta = z @ V.mT - z @ B.mT @ A.mT
        measured = float(((delta @ spectrum.metric) * delta).sum()) / stats.images
        assert float(second.errors()[rank]) == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("objective", ["fisher", "loss", "output"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_ranks_solved_along_with_widths_are_those_solved_at_each(double, objective, has_bias):
    model, batches = double
    if not has_bias:
        model.blocks[0].mlp.fc2.bias = None
    stats = vitlr.calibrate(model, batches, objective=objective, hidden=True)
    ahead = solved(model, stats, "mlp", step=16)["blocks.0.mlp"]
    alone = solved(model, stats, "mlp")["blocks.0.mlp"]
    widths = spread(ahead.choices(16))[:-1]
    assert widths == [16, 32, 48, 64, 80, 96, 112] and not alone._second
    assert (
        ahead.fits(Decomposition(), 16) and not ahead.fits(Decomposition(), 8) and not alone.fits(Decomposition(), 16)
    )
    for width in widths:
        expected = alone.second_spectrum(width).errors()
        found = ahead._second[width]
        assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9 * float(expected[0]))


def test_without_compensation_weights_stay(double):
    model, batches = double
    stats = vitlr.calibrate(model, batches, hidden=True)
    alone = solved(model, stats, "mlp", compensate=False)["blocks.0.mlp"]
    better = solved(model, stats, "mlp")["blocks.0.mlp"]
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
    spectrum = solved(model, stats, "mlp")["blocks.0.mlp"]
    assert torch.isfinite(spectrum.errors).all() and float(spectrum.errors[1]) > 0
    assert float(spectrum.errors[98]) < 1e-3 * float(spectrum.errors[1])
    assert all(torch.isfinite(value).all() for value in spectrum.weights(20))


def test_bad_options_and_moments_are_refused(double):
    model, batches = double
    stats = vitlr.calibrate(model, batches, hidden=True, objective=("loss", "normalized"))
    with pytest.raises(InputError, match="normalized"):
        solved(model, stats, "mlp", "normalized")
    for ridge in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="ridge"):
            solved(model, stats, "mlp", ridge=ridge)
    stats.layers["blocks.1.mlp.fc2"].input_moment[3, 3] = float("nan")
    with pytest.raises(NumericalError, match=r"blocks\.1\.mlp"):
        solved(model, stats, "mlp")


def products(model: torch.nn.Module, name: str, batches: list, samples: int) -> tuple[list, list]:
    """Every image's `Σ_tokens (h − mean h) gᵀ [D, N]` and `Σ_tokens y gᵀ`, y before the bias, for every draw."""
    linear, seen = model.get_submodule(name), {}
    rows, _ = recorded(model, name, batches)
    mean = rows.mean(0)
    handle = linear.register_forward_hook(lambda m, args, y: seen.update(h=args[0].detach(), y=y))
    centred, outputs = [], []
    for images, *_ in batches:
        for image in images:
            logits = model(image[None].requires_grad_())
            for loss in sampled_losses(model, logits, image_seeds([image[None].detach()], 0), samples):
                (g,) = torch.autograd.grad(loss, seen["y"], retain_graph=True)
                centred.append((seen["h"][0] - mean).mT @ g[0])
                outputs.append((seen["y"].detach()[0] - linear.bias).mT @ g[0])
    handle.remove()
    return centred, outputs


@pytest.mark.parametrize(("compensate", "patch_size"), [(True, 8), (False, 4)])  # fewer tokens than outputs, and more
def test_fisher_takes_the_tokens_of_an_image_together_for_widths_too(tiny_vit, batches, compensate, patch_size):
    model = tiny_vit(patch_size=patch_size).double().requires_grad_(False)
    batches = [(images.double(), labels) for images, labels in batches]
    name = "blocks.1.mlp.fc2"
    stats = vitlr.calibrate(model, batches, hidden=True, objective="fisher", samples=2)
    layer, W = stats.layers[name], model.get_submodule(name).weight
    P, Y = products(model, name, batches, 2)
    of_images = sum(p @ p.mT for p in P)
    h, _ = recorded(model, name, batches)
    h = h - h.mean(0)
    M = 0.5 * of_images / of_images.trace() + 0.5 * h.mT @ h / h.square().sum()
    F = sum(y.mT @ y for y in Y)
    F = 0.5 * F / F.trace() + 0.5 * layer.gradient / layer.gradient.trace()
    F = F * of_images.trace() / (2 * len(P))  # half the mean of ||P||^2 over images and draws
    F = F + 0.1 * F.trace() / len(F) * torch.eye(len(F), dtype=F.dtype)

    spectrum = solved(model, stats, "mlp", "fisher", compensate=compensate, ridge=1e-9)["blocks.1.mlp"]
    for width in (3, 8):
        V = torch.zeros_like(W)
        V[:, spectrum.keep(width)] = spectrum.weights(width)[0]
        if not compensate:
            M = spectrum.moments.M()  # nothing moves a mean into the bias
        assert torch.allclose(spectrum.errors[width], torch.trace(F @ (W - V) @ M @ (W - V).mT), rtol=1e-5)
    assert torch.allclose(spectrum.moments.M(centred=True).trace(), torch.tensor(1.0, dtype=torch.float64))


def test_widths_of_fisher_go_into_joint_plans_and_files(double, tmp_path):
    model, batches = double
    stats = vitlr.calibrate(model, batches, hidden=True, objective=("loss", "fisher"))
    halves = [
        vitlr.calibrate(model, part, hidden=True, objective=("loss", "fisher")) for part in (batches[:1], batches[1:])
    ]
    halves[0].save(tmp_path / "s.safetensors")
    merged = Statistics.load(tmp_path / "s.safetensors").merge(halves[1])
    for key in BY_IMAGE_HIDDEN:
        found, expected = (s.layers["blocks.0.mlp.fc2"].sum(key) for s in (merged, stats))
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    for objective in ("loss", "fisher"):
        plan = vitlr.plan(model, stats, "params:70%", method="joint", objective=objective, rank_step=4, width_step=4)
        assert plan.objective == objective and plan.narrowed
        assert vitlr.measuring.cost.count_params(vitlr.apply(model, plan)) == plan.params_kept
    with pytest.raises(InputError, match="weighs whole images"):
        vitlr.plan(model, stats, "params:70%", method="joint", objective="normalized")
    with pytest.raises(InputError, match="2 MLPs take 524,288 bytes, more than hidden_memory=400,000"):
        vitlr.calibrate(model, batches, hidden=True, objective="fisher", hidden_memory=400_000)


@pytest.mark.parametrize("objective", ["loss", "fisher"])
def test_an_mlp_that_nothing_depends_on_costs_nothing_at_any_width(tiny_vit, batches, objective):
    model = tiny_vit(init_values=1.0)
    model.blocks[1].ls2.gamma.data.zero_()
    stats = vitlr.calibrate(model, batches, hidden=True, objective=objective)
    spectra = solved(model, stats, "mlp")
    assert not spectra["blocks.1.mlp"].errors.any() and spectra["blocks.0.mlp"].errors[0] > 0
    plan = vitlr.plan(model, stats, "params:70%", method="joint", rank_step=4, width_step=4)
    assert min(plan.narrowed, key=plan.narrowed.get) == "blocks.1.mlp"
    assert torch.isfinite(vitlr.apply(model, plan)(batches[0][0])).all()


def test_a_narrowed_model_is_planned_again(tiny_vit, batches):
    """Where an MLP is narrower than the embedding its second linear grows: it keeps its width, the others may lose."""
    model = tiny_vit()
    narrow_mlp(find_mlps(model)["blocks.0.mlp"], torch.arange(16))
    stats = vitlr.calibrate(model, batches, hidden=True)
    plan = vitlr.plan(model, stats, "params:75%", method="joint", rank_step=4, width_step=8)
    assert [row.name for row in plan.widths if row.kind == "mlp"] == ["blocks.1.mlp"] and plan.narrowed
    assert {row.name for row in plan.layers} >= {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"}
    small = vitlr.apply(model, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.params_kept
    narrow_mlp(find_mlps(model)["blocks.1.mlp"], torch.arange(16))
    stats = vitlr.calibrate(model, batches, hidden=True)
    with pytest.raises(InputError, match=r"blocks\.0\.mlp has more outputs than inputs.*objective='output'"):
        vitlr.plan(model, stats, "params:75%", method="widths")
