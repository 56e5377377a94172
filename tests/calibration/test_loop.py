"""Moments against sums formed by hand; what must not change them; models that come back untouched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitlr.calibration import hooks
from vitlr.calibration.loop import calibrate
from vitlr.calibration.statistics import SCHEMA, Statistics
from vitlr.calibration.sums import SUMS
from vitlr.errors import InputError
from vitlr.measuring.losses import contrasts, draws, image_seeds, is_logits, sampled_losses
from vitlr.runtime import storage

ALL = {
    "objective": ("loss", "output", "normalized", "fisher"),
    "extras": ("input_moment", "input_abs", "row_gradient", "rounding", "ranges"),
}


def close(a, b, rtol=2e-5):
    a, b = a.detach(), b.detach()
    scale = float(b.abs().max()) or 1.0
    assert float((a - b).abs().max()) <= rtol * scale


def equal_sums(one, two, rtol=2e-5):
    assert one.images == two.images and list(one.layers) == list(two.layers)
    for name, layer in one.layers.items():
        assert layer.tokens == two.layers[name].tokens
        for key, tensor in layer.sums():
            close(tensor, getattr(two.layers[name], key), rtol)


def recorded(model, images, seed=0, loss=None):
    """Inputs, outputs and output gradients of every linear, from plain autograd on one batch."""
    seen, handles = {}, []
    model = copy.deepcopy(model).eval()

    def hook(name):
        def run(module, args, output):
            output.retain_grad()
            seen[name] = (args[0], output)

        return run

    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "head":
            handles.append(module.register_forward_hook(hook(name)))
    output = model(images)
    if loss is None:
        sampled_losses(model, output, image_seeds([images], seed), 1)[0].backward()
    else:
        loss(output, images).backward()
    return {name: (x.detach(), y.detach(), y.grad) for name, (x, y) in seen.items()}


def test_every_row_of_the_table_is_collected_when_asked_for_in_the_shape_it_says(tiny_vit, images):
    stats = calibrate(tiny_vit(), [images], **ALL, hidden="attention")
    assert {key for layer in stats.layers.values() for key, _ in layer.sums()} == set(SUMS)
    heads, d = stats.layers["blocks.0.attn.qkv"].score_moment.shape[:2]
    for layer in stats.layers.values():
        assert all(tensor.shape == layer.shape(key, heads, d) for key, tensor in layer.sums())
    bare = calibrate(tiny_vit(), [images], objective="output", hidden=False)
    assert {key for layer in bare.layers.values() for key, _ in layer.sums()} == {"moment", "input_sum"}
    with pytest.raises(AttributeError, match="has no 'momentum'"):
        _ = bare.layers["blocks.0.attn.qkv"].momentum


@pytest.mark.parametrize("width", [32, 64])  # with more and with fewer tokens than half the width
def test_every_sum_matches_its_definition(tiny_vit, images, width):
    model = tiny_vit(embed_dim=width)
    stats = calibrate(model, [images], **ALL)
    by_hand = recorded(model, images)
    assert set(stats.layers) == set(by_hand)
    for name, (x, y, g) in by_hand.items():
        layer, module = stats.layers[name], model.get_submodule(name)
        W, b = module.weight.double(), module.bias.double()
        x, y, g = (t.double() for t in (x, y, g))
        y = y - b
        X, Y, D = (t.reshape(-1, t.shape[-1]) for t in (x, y, g))
        out = layer.side == "output"
        assert out == (W.shape[0] <= W.shape[1]) and layer.tokens == X.shape[0]
        close(layer.moment, Y.T @ Y if out else X.T @ X)
        close(layer.gradient, D.T @ D if out else (D @ W).T @ (D @ W))
        weight = (1 / y.reshape(len(images), -1).square().sum(1)).repeat_interleave(X.shape[0] // len(images))
        small = Y if out else X
        close(layer.normalized, (small * weight[:, None]).T @ small)
        P = torch.einsum(
            "itm,itn->imn", *(t.reshape(len(images), -1, layer.size) for t in ((y, g) if out else (x, g @ W)))
        )
        close(layer.image_moment, (P @ P.mT).sum(0))
        close(layer.image_gradient, (P.mT @ P).sum(0))
        close(layer.input_sum, X.sum(0))
        close(layer.input_moment, X.T @ X)
        close(layer.input_abs, X.abs().sum(0))
        close(layer.input_square if out else layer.output_square, (X if out else D).square().sum(0))
        assert torch.equal(layer.input_low, X.amin(0).double()) and torch.equal(layer.input_high, X.amax(0).double())
        per_image = torch.einsum(
            "itn,itk->ink", g.reshape(len(images), -1, len(W)), x.reshape(len(images), -1, W.shape[1])
        )
        close(layer.row_gradient, per_image.square().sum((0, 2)))
        if not out:
            close(layer.output_gradient, D.T @ D)
        if out:
            weighted = (small * weight[:, None]).T @ small
            assert float(weighted.detach().trace()) == pytest.approx(len(images), rel=1e-4)


@pytest.mark.parametrize("options", [{}, ALL, {"objective": "output"}, {"samples": 3, "seed": 5}])
def test_batch_size_order_and_merging_change_nothing(tiny_vit, images, options):
    model = tiny_vit()
    whole = calibrate(model, [images], **options)
    equal_sums(calibrate(model, list(images.split(1)), **options), whole)
    equal_sums(calibrate(model, [images.flip(0)], **options), whole)
    parts = [calibrate(model, [part], **options) for part in images.split(4)]
    equal_sums(parts[0].merge(parts[1]), whole)
    continued = calibrate(model, [images[4:]], stats=calibrate(model, [images[:4]], **options), **options)
    equal_sums(continued, whole)


def test_wide_layers_have_their_products_sketched(tiny_vit, images, monkeypatch):
    """`P Ω` in place of every image's P, with the image's own Ω: whatever the batches, and the same on average."""
    model, name = tiny_vit(embed_dim=64), "blocks.1.mlp.fc2"

    def loss(output, batch):  # the same for every seed: only sketches differ
        return output.float().logsumexp(1).sum() + output[:, 0].square().sum()

    def sums(batches, seed=0):
        layer = calibrate(model, batches, hidden=True, loss_fn=loss, seed=seed).layers[name]
        keys = ("image_moment", "image_gradient", "image_input_moment", "image_input_sum", "image_output_gradient")
        return {key: layer.sum(key) for key in keys}

    exact = sums([images])  # 17 tokens: fewer than COLUMNS
    monkeypatch.setattr(hooks, "COLUMNS", 4)
    found = [sums(images.flip(0).split(2), seed) for seed in range(48)]
    for key, tensor in sums([images]).items():
        close(found[0][key], tensor)
        values = torch.stack([sum_[key] for sum_ in found])
        error, spread = (values.mean(0) - exact[key]).square().mean(), values.var(0).mean() / len(values)
        assert spread > 0 and error < 3 * spread and spread.sqrt() < 0.2 * exact[key].square().mean().sqrt()

    h, _, g = (t.double() for t in recorded(model, images, loss=loss)[name])
    omega = draws([s ^ 1 for s in image_seeds([images], 0)], 1, (64, 4), torch.randn)[0].double() / 2
    P, total = h.mT @ g @ omega, (g @ omega).sum(1)
    mean = torch.randn(256, dtype=torch.float64)  # about any mean, the three sums are those of the same P Ω
    centred = P - mean[:, None] * total[:, None]
    layer = {key: tensor.double() for key, tensor in found[0].items()}
    cross = torch.outer(layer["image_input_sum"], mean)
    about = layer["image_input_moment"] - cross - cross.T + layer["image_output_gradient"] * torch.outer(mean, mean)
    close(about, (centred @ centred.mT).sum(0))


def test_the_model_comes_back_as_it_was(tiny_vit, images):
    model = tiny_vit(drop_rate=0.5).train()
    model.blocks[0].eval()
    model.blocks[1].mlp.fc1.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones_like(model.head.bias)
    before, gradients = copy.deepcopy(model), [p.grad for p in model.parameters()]
    state = torch.get_rng_state()
    calibrate(model, [images])
    assert torch.equal(state, torch.get_rng_state())
    for (name, old), (_, new) in zip(before.named_modules(), model.named_modules(), strict=True):
        assert old.training == new.training, name
        assert len(new._forward_hooks) + len(new._forward_pre_hooks) == 0
    for old, new, grad in zip(before.parameters(), model.parameters(), gradients, strict=True):
        assert torch.equal(old, new) and old.requires_grad == new.requires_grad and new.grad is grad


def test_it_makes_its_own_gradients_and_refuses_inference_mode(tiny_vit, images):
    model = tiny_vit()
    with torch.no_grad():
        equal_sums(calibrate(model, [images]), calibrate(model, [images]))
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        calibrate(model, [images])


def test_loaders_of_tensors_tuples_and_dicts_agree(tiny_vit, images):
    model = tiny_vit()
    whole = calibrate(model, [images])
    equal_sums(calibrate(model, [(images, torch.zeros(6))]), whole)
    seen = []
    equal_sums(calibrate(model, [images[:0], images], on_batch=lambda s: seen.append(s.images)), whole)
    assert seen == [6]

    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.num_classes = model, model.num_classes

        def forward(self, pixel_values):
            return {"logits": self.inner(pixel_values)}

    stats = calibrate(ByName(), [{"pixel_values": images, "labels": torch.zeros(6)}])
    close(stats.layers["inner.blocks.0.mlp.fc2"].gradient, whole.layers["blocks.0.mlp.fc2"].gradient)


class Shared(nn.Module):
    """q, k and a wide layer read one tensor; `wide` and `wider` share a moment, and `dead` is never called."""

    def __init__(self, dead=False):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.wide, self.wider = nn.Linear(8, 16), nn.Linear(8, 24)
        self.narrow = nn.Linear(24, 5)
        if dead:
            self.dead = nn.Linear(8, 8)

    def forward(self, x):
        scores = (self.q(x) * self.k(x)).sum(-1, keepdim=True)
        return self.narrow(F.gelu(self.wider(x)) * scores + self.wide(x).mean(-1, keepdim=True)).mean(1)


def test_layers_with_one_input_share_one_moment_but_not_their_gradients():
    model, x = Shared(), torch.randn(5, 4, 8)
    stats = calibrate(model, list(x.split(2)), include="q|k|wide|narrow")
    assert stats.layers["wider"].owner == "wide" and stats.layers["wider"].moment is stats.layers["wide"].moment
    X = x.double().reshape(-1, 8)
    close(stats.layers["wider"].moment, X.T @ X)
    for name, (_, _, g) in recorded(model, x).items():
        if stats.layers[name].side == "input":
            D = g.double().reshape(-1, g.shape[-1]) @ model.get_submodule(name).weight.double()
            close(stats.layers[name].gradient, D.T @ D)


@pytest.mark.parametrize("objective", ["loss", "output"])
def test_layers_that_no_image_reaches_stay_dense_and_are_named(objective, caplog):
    stats = calibrate(Shared(dead=True), [torch.randn(2, 4, 8)], objective=objective)
    assert len(stats.layers) == 5 and stats.notes["unreached"] == ["dead"]
    assert "1 layers stay dense (dead): images do not call them" in caplog.text
    with pytest.raises(InputError, match="dead"):  # nothing is left
        calibrate(Shared(dead=True), [torch.randn(2, 4, 8)], include="dead")


def test_features_get_a_gradient_from_noise(tiny_vit, images):
    model = tiny_vit(num_classes=0)
    whole = calibrate(model, [images])
    equal_sums(calibrate(model, list(images.split(2))), whole)
    assert all(layer.gradient.abs().sum() > 0 for layer in whole.layers.values())


def test_own_losses_and_outputs_are_used(tiny_vit, images):
    model = tiny_vit()
    labels = torch.arange(6) % 5
    plain = calibrate(
        model, [(images, labels)], loss_fn=lambda out, batch: F.cross_entropy(out, batch[1], reduction="sum")
    )
    assert plain.layers["blocks.0.mlp.fc2"].gradient.abs().sum() > 0
    double = calibrate(
        model, [(images, labels)], loss_fn=lambda out, b: 2 * F.cross_entropy(out, b[1], reduction="sum")
    )
    close(double.layers["blocks.0.mlp.fc2"].gradient, 4 * plain.layers["blocks.0.mlp.fc2"].gradient)
    picked = calibrate(model, [images], output_fn=lambda out: out[:, :3])
    assert not torch.allclose(picked.layers["blocks.0.mlp.fc2"].gradient, plain.layers["blocks.0.mlp.fc2"].gradient)


def test_the_sampled_loss_estimates_the_kl_divergence():
    """½ E[(gᵀδ)²] over many draws is the KL that a small δ causes."""
    torch.manual_seed(1)
    logits = torch.randn(1, 7, dtype=torch.float64).requires_grad_()
    delta = 1e-3 * torch.randn(1, 7, dtype=torch.float64)
    model = nn.Identity()
    model.num_classes = 7
    total = 0.0
    losses = sampled_losses(model, logits, [3], 4000)
    for loss in losses:
        (g,) = torch.autograd.grad(loss, logits, retain_graph=True)
        total += 0.5 * float((g * delta).sum()) ** 2
    log_p, log_q = logits.detach().log_softmax(-1), (logits + delta).detach().log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum())
    assert total / 4000 == pytest.approx(kl, rel=0.1)


def test_activation_checkpointing_counts_every_token_once(tiny_vit, images):
    model = tiny_vit()
    plain = calibrate(model, [images])
    model.set_grad_checkpointing()
    equal_sums(calibrate(model, [images]), plain)


def test_half_precision_models_are_measured(tiny_vit, images):
    exact, rough = calibrate(tiny_vit(), [images]), calibrate(tiny_vit().bfloat16(), [images])
    for name in exact.layers:
        close(rough.layers[name].moment, exact.layers[name].moment, rtol=0.1)


def test_statistics_survive_the_disk(tiny_vit, images, tmp_path):
    stats = calibrate(tiny_vit(), [images], **ALL)
    stats.notes["data"] = "somewhere"
    stats.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    equal_sums(loaded, stats, rtol=0)
    assert (loaded.notes, loaded.macs, loaded.input_shape) == (stats.notes, stats.macs, stats.input_shape)
    shared = calibrate(Shared(), [torch.randn(2, 4, 8)])
    shared.save(tmp_path / "t.safetensors")
    again = Statistics.load(tmp_path / "t.safetensors")
    assert again.layers["wider"].moment is again.layers["wide"].moment


def test_a_file_of_before_whose_symmetric_sums_are_whole_is_read_and_gone_on_from(tiny_vit, images, tmp_path):
    model = tiny_vit()
    stats, first = calibrate(model, list(images.split(4)), **ALL), calibrate(model, [images[:4]], **ALL)
    first.save(tmp_path / "new")
    tensors, header = storage.load_tensors(tmp_path / "new", kind="statistics", schema=SCHEMA)
    for name, layer in first.layers.items():
        tensors |= {f"{name}|{key}": tensor for key, tensor in layer.sums()}
    storage.save_tensors(tmp_path / "old", tensors, header, kind="statistics", schema=1)
    found = [Statistics.load(tmp_path / file) for file in ("new", "old")]
    assert (tmp_path / "new").stat().st_size < 0.65 * (tmp_path / "old").stat().st_size
    equal_sums(*found, rtol=0)
    for begun in found:
        equal_sums(calibrate(model, list(images[4:].split(4)), stats=begun, **ALL), stats, rtol=0)


def test_an_input_that_was_written_to_is_another_input():
    class Rewriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.twice = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x):
            x = x + 0
            y = self.a(x) + self.twice(x)
            x = x.relu_()
            return y + self.b(x) + self.twice(x)

    x = torch.randn(5, 4)
    stats = calibrate(Rewriting(), [x], objective="output")
    X, R = x.double(), x.double().relu()
    close(stats.layers["a"].moment, X.T @ X)
    close(stats.layers["b"].moment, R.T @ R)
    close(stats.layers["twice"].moment, X.T @ X + R.T @ R)


def test_embeddings_are_features_and_every_tensor_seeds_its_image():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 6)

        def forward(self, x):
            return F.normalize(self.proj(x), dim=-1)

    assert not is_logits(Encoder(), torch.randn(2, 6))
    a, b = torch.ones(3, 2), torch.arange(6.0).reshape(3, 2)
    assert len(set(image_seeds([a], 0))) == 1 and len(set(image_seeds([a, b], 0))) == 3


class Stacked(nn.Module):
    """Two views of every image, stacked behind each other or beside each other in the batch."""

    def __init__(self, net, beside):
        super().__init__()
        self.net, self.beside = net, beside

    def forward(self, x):
        views = x, x.flip(-1) * 0.5
        both = torch.stack(views, 1).flatten(0, 1) if self.beside else torch.cat(views)
        answer = self.net(both)
        return answer.view(-1, 2, answer.shape[-1]).mean(1) if self.beside else sum(answer.chunk(2)) / 2


@pytest.mark.parametrize("beside", [True, False])
def test_sums_of_images_do_not_depend_on_how_their_rows_lie_in_the_batch(tiny_vit, beside):
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    model = Stacked(tiny_vit(), beside)
    how = {"objective": ("fisher", "loss", "normalized"), "extras": ("row_gradient",)}
    at_once, one_by_one = calibrate(model, [x[:2], x[2:]], **how), calibrate(model, x.split(1), **how)
    for name, layer in at_once.layers.items():
        for key, value in layer.sums():
            close(value, one_by_one.layers[name].sum(key), rtol=1e-3)


def test_images_that_change_each_other_are_refused_where_single_ones_count(tiny_vit):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_vit()

        def forward(self, x):
            return self.net(x + x.mean(0))

    x = torch.randn(4, 3, 32, 32)
    with pytest.raises(InputError, match="sees an image otherwise when another one is in the batch"):
        calibrate(Mixed(), [x])
    assert calibrate(Mixed(), [x], objective="loss").images == 4


@pytest.mark.parametrize(("classes", "spread"), [(2, 1.0), (7, 2.0), (40, 30.0)])
def test_contrasts_have_the_fisher_matrix_for_their_second_moment(classes, spread):
    """The columns of L are what single signs give; L Lᵀ is F, also where a class is certain to the last digit."""
    logits = spread * torch.randn(1, classes, dtype=torch.float64)
    p = logits.softmax(-1)[0]
    L = torch.stack([contrasts(logits, e[None]) for e in torch.eye(classes, dtype=torch.float64)], -1)[0]
    assert torch.isfinite(L).all()
    torch.testing.assert_close(L @ L.mT, p.diag() - p[:, None] * p, rtol=1e-9, atol=1e-15)


def test_of_two_classes_every_draw_tells_as_much():
    logits = torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    signs = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]], [[-1.0, 1.0]]], dtype=torch.float64)
    w = contrasts(logits, signs)
    p = logits.softmax(-1)[0]
    for one in w[:, 0]:
        torch.testing.assert_close(one[:, None] * one, p.diag() - p[:, None] * p)
