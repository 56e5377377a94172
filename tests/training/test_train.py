"""What training does: it learns, minimises what it says, repeats itself, and stops before it does harm."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import vitlr
from vitlr.training import TrainRecipe, train


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def top1(model, dataset):
    images, labels = dataset.tensors
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).double().mean())


def test_it_learns(vit, loader, dataset, quick):
    model = vit()
    report = train(model, loader(), TrainRecipe(**{**quick, "epochs": 8}), validate=lambda m: top1(m, dataset))
    assert top1(model, dataset) == max(epoch.validation for epoch in report.epochs) > 90
    assert report.updates == 48 and report.images == 8 * 48 and len(report.epochs) == 8
    assert report.epochs[-1].loss < report.epochs[0].loss and report.epochs[0].distillation is None
    assert not model.training and "kept: epoch" in str(report)


def test_one_update_is_that_of_plain_torch(vit, dataset):
    images, labels = dataset.tensors[0][:8], dataset.tensors[1][:8]
    ours, theirs = vit(), vit()
    recipe = TrainRecipe(
        epochs=1,
        opt="momentum",
        momentum=0,
        lr=0.1,
        warmup_epochs=0,
        weight_decay=0,
        sched="constant",
        clip_grad=None,
        amp=False,
    )
    train(ours, [(images, labels)], recipe, penalty=lambda m: 0.01 * m.head.weight.abs().sum())
    theirs.train()
    loss = F.cross_entropy(theirs(images), labels, label_smoothing=0.1) + 0.01 * theirs.head.weight.abs().sum()
    loss.backward()
    with torch.no_grad():
        for p in theirs.parameters():
            p -= 0.1 * p.grad
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_accumulated_batches_are_one_large_one(vit, dataset, quick):
    images, labels = dataset.tensors
    small = [(images[i : i + 8], labels[i : i + 8]) for i in range(0, 32, 8)]
    large = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 32, 16)]
    first, second = vit(), vit()
    a = train(first, small, TrainRecipe(**quick, grad_accum_steps=2))
    b = train(second, large, TrainRecipe(**quick))
    assert a.updates == b.updates == 6
    assert a.epochs[-1].loss == pytest.approx(b.epochs[-1].loss, rel=1e-4)


def test_distillation_pulls_towards_the_reference(vit, loader, dataset, quick):
    reference, student, images = vit(), vit(embed_dim=16), dataset.tensors[0]
    with torch.no_grad():
        reference.head.weight *= 20  # answers that say something else than the labels

    def distance():
        with torch.no_grad():
            answers, expected = student(images).log_softmax(1), reference(images).log_softmax(1)
        return float(F.kl_div(answers, expected, log_target=True, reduction="batchmean"))

    was, before = distance(), state(reference)
    report = train(
        student, loader(), TrainRecipe(**{**quick, "lr": 0.01}, distill_loss_weight=1.0), reference=reference
    )
    assert distance() < 0.5 * was and same(before, state(reference))
    assert report.epochs[-1].distillation == pytest.approx(report.epochs[-1].loss)


def test_low_rank_layers_stay_low_rank(vit, loader, dataset, quick):
    dense = vit()
    small = vitlr.apply(
        dense, vitlr.plan(dense, vitlr.calibrate(dense, [dataset.tensors[0]]), "params:50%", rank_step=1)
    )
    ranks = [m.rank for m in small.modules() if isinstance(m, vitlr.LowRankLinear)]
    report = train(small, loader(), TrainRecipe(**quick), reference=dense)
    assert ranks == [m.rank for m in small.modules() if isinstance(m, vitlr.LowRankLinear)] != []
    assert report.epochs[-1].loss < report.epochs[0].loss


@pytest.mark.parametrize("choice", [{}, {"mixup": 0.4, "cutmix": 1.0}, {"model_ema": True}, {"opt": "lamb"}])
def test_a_seed_decides_everything(vit, loader, quick, choice):
    runs = []
    for seed in (0, 0, 1):
        model = vit(proj_drop_rate=0.1, drop_path_rate=0.1)
        torch.manual_seed(len(runs))  # the caller's generators matter to nothing
        before = torch.get_rng_state()
        train(model, loader(), TrainRecipe(**quick, **choice, seed=seed))
        assert torch.equal(before, torch.get_rng_state())
        runs.append(state(model))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_frozen_parameters_and_modes_stay(vit, loader, quick):
    model = vit()
    model.patch_embed.requires_grad_(False)
    model.blocks[0].train()
    before = state(model)
    train(model, loader(), TrainRecipe(**quick))
    after = state(model)
    assert torch.equal(before["patch_embed.proj.weight"], after["patch_embed.proj.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert model.blocks[0].training and not model.blocks[1].training


def test_callbacks_see_every_update(vit, loader, quick):
    seen = []
    train(vit(), loader(), TrainRecipe(**quick), callbacks=[seen.append])
    assert [step.updates for step in seen] == list(range(1, 19)) and {step.total for step in seen} == {18}
    assert [step.epoch for step in seen[5:8]] == [1, 2, 2]
    rates = [step.lr for step in seen]
    assert max(rates) <= quick["lr"] and rates[-1] < 0.1 * max(rates) and rates[0] < rates[3]


def test_the_running_mean_is_what_comes_back(vit, loader, quick):
    raw, mean = vit(), vit()
    judged = []
    train(raw, loader(), TrainRecipe(**quick))
    train(
        mean, loader(), TrainRecipe(**quick, model_ema=True), validate=lambda m: judged.append(state(m)) or len(judged)
    )
    assert same(judged[-1], state(mean)) and not same(state(raw), state(mean))


def test_the_best_epoch_is_kept(vit, loader, quick):
    judged = []

    def validate(model):
        judged.append(state(model))
        return [10.0, 30.0, 20.0][len(judged) - 1]

    best, last = vit(), vit()
    assert train(best, loader(), TrainRecipe(**quick), validate=validate).kept == 2
    assert same(state(best), judged[1])
    judged.clear()
    assert train(last, loader(), TrainRecipe(**quick, keep="last"), validate=validate).kept == 3
    assert same(state(last), judged[2])


def test_a_loss_that_is_no_number_stops(vit, loader, quick):
    judged, calls = [], []

    def loss(logits, targets):
        calls.append(1)
        return F.cross_entropy(logits, targets) * (float("nan") if len(calls) == 9 else 1)

    model = vit()
    report = train(model, loader(), TrainRecipe(**quick), loss=loss, validate=lambda m: judged.append(state(m)) or 1.0)
    assert "loss was nan at update 9" in report.note and report.kept == 1 and report.updates == 8
    assert same(state(model), judged[0])


def test_weights_that_are_no_numbers_are_not_kept(vit, loader, quick):
    model = vit()
    before = state(model)

    def spoil(step):
        if step.updates == 6:
            step.model.head.bias.data.fill_(float("inf"))

    report = train(model, loader(), TrainRecipe(**quick), callbacks=[spoil])
    assert "weights were no numbers after epoch 1" in report.note and report.kept == 0
    assert same(before, state(model))


def test_low_rank_factors_are_balanced_first(vit, loader, dataset, quick):
    dense = vit()
    stats = vitlr.calibrate(dense, [dataset.tensors[0]])
    small = vitlr.apply(dense, vitlr.plan(dense, stats, "params:50%", rank_step=1))
    spoilt = copy.deepcopy(small)
    for module in spoilt.modules():
        if isinstance(module, vitlr.LowRankLinear):
            module.up.weight.data *= 64
            module.down.weight.data /= 64
    reports = [train(model, loader(), TrainRecipe(**quick)) for model in (small, spoilt)]
    assert reports[0].epochs[-1].loss == pytest.approx(reports[1].epochs[-1].loss, rel=1e-3)


def test_autocast_runs(vit, loader, quick):
    assert train(vit(), loader(), TrainRecipe(**{**quick, "amp": True})).epochs[-1].loss < 2
