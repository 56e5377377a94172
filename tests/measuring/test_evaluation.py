"""Metrics against definitions written out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitlr.errors import InputError, NumericalError
from vitlr.measuring.evaluation import evaluate, wilson


class Table(nn.Module):
    """A model whose logits are its images: what comes out is known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def test_against_plain_definitions(tiny_vit, batches):
    model, reference = tiny_vit(num_classes=9), tiny_vit(num_classes=9, seed=1)
    metrics = evaluate(model, batches, reference)
    x, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        z, expected = model(x).double(), reference(x).double()
    order = z.argsort(dim=1, descending=True)
    p, q = expected.softmax(1), z.softmax(1)
    assert metrics.images == 11 and metrics.skipped == 0
    assert metrics.top1 == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert metrics.top5 == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert metrics.agreement == pytest.approx(100 * (order[:, 0] == expected.argmax(1)).double().mean().item())
    assert metrics.kl == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)
    assert metrics.kl > 0.1 and 0 < metrics.agreement < 100


def test_batch_size_changes_nothing(tiny_vit, batches):
    x, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    one_by_one = [(x[i : i + 1], labels[i : i + 1]) for i in range(len(x))]
    a, b = (evaluate(tiny_vit(), data, tiny_vit(seed=1)) for data in (batches, one_by_one))
    assert (a.top1, a.top5, a.agreement, a.images) == (b.top1, b.top5, b.agreement, b.images)
    assert a.kl == pytest.approx(b.kl, rel=1e-4)


def test_a_model_agrees_with_itself(tiny_vit, batches):
    model = tiny_vit()
    metrics = evaluate(model, batches, model)
    assert metrics.agreement == 100.0 and metrics.kl == 0.0
    alone = evaluate(model, batches)
    assert alone.agreement is None and alone.kl is None and alone.top1 == metrics.top1


def test_known_logits():
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6], [0, 9, 0, 0, 0, 0]])
    metrics = evaluate(Table(), [(logits, torch.tensor([0, 0, 1]))])
    assert metrics.top1 == pytest.approx(200 / 3) and metrics.top5 == pytest.approx(200 / 3)
    assert 20 < metrics.top1_low < 200 / 3 < metrics.top1_high < 95


def test_constant_logits_are_not_all_right():
    metrics = evaluate(Table(), [(torch.zeros(4, 8), torch.arange(4))])
    assert metrics.top1 <= 25


def test_fewer_than_five_classes():
    metrics = evaluate(Table(), [(torch.tensor([[1.0, 2, 3], [3, 2, 1]]), torch.tensor([0, 0]))])
    assert (metrics.top1, metrics.top5) == (50.0, 100.0)


def test_modes_dtype_and_random_state_are_left_alone(tiny_vit, batches):
    model = tiny_vit(drop_rate=0.5).to(torch.bfloat16).train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    before = torch.get_rng_state()
    metrics = evaluate(model, batches, tiny_vit())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert model.head.weight.dtype == torch.bfloat16
    assert 0 < metrics.kl < 0.05  # bfloat16 against float32 weights of the same model


def test_progress_and_dict(tiny_vit, batches):
    seen = []
    metrics = evaluate(tiny_vit(), batches, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, None), (8, None), (11, None)]
    found = json.loads(json.dumps(metrics.to_dict()))
    assert list(found) == ["top1", "top5", "agreement", "kl", "images", "skipped", "top1_low", "top1_high"]
    assert "11 images" in str(metrics) and f"{metrics.top1:.2f}" in str(metrics)


def test_progress_reaches_the_total_with_corrupt_files(tiny_vit, image_folder):
    from vitlr.data.loader import open_data

    path = image_folder()
    (path / "c" / "1.jpg").write_bytes(b"broken")
    seen = []
    loader = open_data(path, tiny_vit(), batch_size=4, need_labels=True)
    metrics = evaluate(tiny_vit(), loader, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (10, 10) and (metrics.images, metrics.skipped) == (9, 1)


def test_classes_in_another_order_than_the_models_are_refused():
    """A model that is right but for a permutation of its classes, not one that guesses or always says the same."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20).repeat_interleave(3)
    sure = 5 * F.one_hot(labels, 20) + torch.randn(60, 20, generator=generator)
    assert evaluate(Table(), [(sure, labels)]).top1 > 90
    with pytest.raises(InputError, match=r"numbered otherwise than the model's: .*class 0 is called 19"):
        evaluate(Table(), [(sure.flip(1)[:30], labels[:30]), (sure.flip(1)[30:], labels[30:])])
    for guess in (torch.randn(60, 20, generator=generator), torch.ones(60, 20), sure[torch.randperm(60)]):
        assert evaluate(Table(), [(guess, labels)]).images == 60
    thirds = torch.arange(9).repeat_interleave(4)
    for classes in (3, 5, 9):  # where an odd number is reversed, the one in the middle stays right
        some = thirds[thirds < classes]
        few = 5 * F.one_hot(some, classes) + torch.randn(len(some), classes, generator=generator)
        assert evaluate(Table(), [(few, some)]).top1 > 90
        with pytest.raises(InputError, match=f"class 0 is called {classes - 1}"):
            evaluate(Table(), [(few.flip(1), some)])
    merged = 5.0 * F.one_hot(thirds // 3 * 3, 9)  # three classes are taken for one: wrong, but in order
    assert evaluate(Table(), [(merged, thirds)]).top1 == pytest.approx(100 / 3)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (5, 10), (1074, 1300)])
def test_wilson_solves_its_equation(successes, trials):
    z, p = 1.959963984540054, successes / trials
    for bound in wilson(successes, trials):
        assert (p - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / trials, abs=1e-12)
    low, high = wilson(successes, trials)
    assert 0 <= low <= p <= high <= 1 and math.isfinite(high)


def test_wilson_of_the_published_subset():
    low, high = wilson(1074, 1300)
    assert (round(100 * low, 2), round(100 * high, 2)) == (80.46, 84.58)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.zeros(2, 6), "no labels"),
        ((torch.zeros(2, 6),), "no labels"),
        ((torch.zeros(2, 6), torch.zeros(3, dtype=torch.int64)), r"expected \[2\] integers"),
        ((torch.zeros(2, 6), torch.zeros(2)), "integers"),
        ((torch.zeros(2, 6), torch.tensor([0, 6])), "labels from 0 to 6, the model has 6 classes"),
        ((torch.zeros(2, 6), torch.tensor([-1, 0])), "labels from -1"),
    ],
)
def test_batches_that_cannot_be_judged(batch, said):
    with pytest.raises(InputError, match=said):
        evaluate(Table(), [batch])


def test_images_without_labels_are_compared_with_a_reference(tiny_vit, batches):
    """Agreement and KL need none; labels of a data set whose classes nobody compared with the model's do not count."""
    model, other = tiny_vit(), tiny_vit(seed=1)
    metrics = evaluate(model, [x for x, _ in batches], other)
    whole = evaluate(model, batches, other)
    assert (metrics.top1, metrics.top5, metrics.top1_low) == (None, None, None)
    assert (metrics.agreement, metrics.kl, metrics.images) == (whole.agreement, whole.kl, 11)
    assert str(metrics) == f"agreement {whole.agreement:.2f} %, KL {whole.kl:.4f} nats, 11 images"
    with pytest.raises(InputError, match="labels to 4 of 8 images"):
        evaluate(model, [batches[0], batches[1][0]], other)


def test_a_loader_whose_labels_are_not_the_models_classes_measures_no_accuracy(tiny_vit, image_folder):
    from vitlr.data.loader import open_data

    loader = open_data(image_folder(classes=("x", "y")), tiny_vit())
    assert evaluate(tiny_vit(), loader, tiny_vit(seed=1)).top1 is None
    with pytest.raises(InputError, match="need_labels=True"):
        evaluate(tiny_vit(), loader)


def test_dicts_are_judged_like_tuples(batches):
    """As every loader of transformers gives them."""

    class Named(nn.Module):
        def forward(self, pixel_values):
            return {"loss": pixel_values.mean(), "logits": pixel_values}

    x, y = torch.randn(6, 5), torch.randint(0, 5, (6,))
    for key in ("labels", "label"):
        found = evaluate(Named(), [{"pixel_values": x, key: y}])
        assert found == evaluate(Table(), [(x, y)])


@pytest.mark.parametrize(
    ("loader", "reference", "said"),
    [
        (nn.Identity(), None, "the loader is a Identity, expected batches"),
        (None, None, "the loader is a NoneType"),
        ([(torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]))], None, r"the model cannot take .*\[2, 3, 16, 16\]"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))], [1], "reference= is a list, expected a model"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(tiny_vit, loader, reference, said):
    with pytest.raises(InputError, match=said):
        evaluate(tiny_vit(), loader, reference)


def test_no_images_features_and_other_classes(tiny_vit, batches):
    with pytest.raises(InputError, match="no images"):
        evaluate(tiny_vit(), [])
    with pytest.raises(InputError, match="expected logits"):
        evaluate(nn.Identity(), batches)
    with pytest.raises(InputError, match="the reference has 7 classes, the model 5"):
        evaluate(tiny_vit(), batches, tiny_vit(num_classes=7))


@pytest.mark.parametrize("which", ["model", "reference"])
def test_nan_is_an_error(tiny_vit, batches, which):
    models = {"model": tiny_vit(), "reference": tiny_vit()}
    models[which].head.bias.data[0] = float("nan")
    with pytest.raises(NumericalError, match=f"logits of the {which}"):
        evaluate(models["model"], batches, models["reference"])


def test_labels_of_sets_that_have_none_and_lists_of_labels_are_read():
    logits = torch.randn(4, 6)
    nobody = torch.full((4,), -1)
    assert evaluate(Table(), [(logits, nobody)], Table()).top1 is None
    with pytest.raises(InputError, match="yields no labels"):
        evaluate(Table(), [(logits, nobody)])
    best = logits.argmax(1)
    assert evaluate(Table(), [(logits, best.tolist())]).top1 == 100


def test_models_that_fail_on_a_batch_by_an_attribute_are_no_crash():
    class Named(torch.nn.Module):
        def forward(self, pixel_values=None, **more):
            return pixel_values.flatten(1)

    with pytest.raises(InputError, match=r"the model cannot take what the loader gives \(\[2, 6\] torch.float32\)"):
        evaluate(Named(), [{"image": torch.randn(2, 6), "labels": torch.zeros(2).long()}])
