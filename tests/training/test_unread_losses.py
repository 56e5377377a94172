"""On a device that runs behind: no step waits for its loss, in training as in distilling; a bad one still ends it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reads import Reads

from vitlr.training import TrainRecipe, loop, state, train


@pytest.fixture
def as_elsewhere(monkeypatch):
    """The CPU taken for a device that one has to wait for."""
    for module in (loop, state):
        monkeypatch.setattr(module, "read_freely", lambda t: False)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run(vit, loader, quick, **more):
    model = vit()
    with Reads() as mode:
        report = train(model, loader(), TrainRecipe(**quick), **more)
    return report, mode.count, model


def test_no_update_reads_its_loss(vit, loader, quick, request):
    plain, many, ours = run(vit, loader, quick)
    request.getfixturevalue("as_elsewhere")
    found, few, theirs = run(vit, loader, quick)
    # Of every update the sum of the loss, the task and what is checked; of every epoch two means and the check.
    assert many - few == 3 * plain.updates - 3 * len(plain.epochs)
    for a, b in zip(plain.epochs, found.epochs, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-12) and b.task == pytest.approx(a.task, rel=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.usefixtures("as_elsewhere")
def test_a_loss_that_was_no_number_is_found_before_anything_is_judged(vit, loader, quick):
    judged, calls = [], []

    def loss(logits, targets):
        calls.append(1)
        return F.cross_entropy(logits, targets) * (float("nan") if len(calls) == 9 else 1)

    report, _, model = run(vit, loader, quick, loss=loss, validate=lambda m: judged.append(weights(m)) or 1.0)
    assert "the loss was no number at update 9" in report.note and report.kept == 1 and len(judged) == 1
    assert all(torch.equal(tensor, judged[0][name]) for name, tensor in weights(model).items())
