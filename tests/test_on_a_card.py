"""A model on a card, from calibration to refinement: everything follows it, nothing of the host gets in between."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import card, moved
from torch import nn

import vitlr
from vitlr.decomposition import solving
from vitlr.training.loop import train

PLANS = [
    ("params:60%", {"rank_step": 4, "width_step": 4}),
    ("params:60%", {"rank_step": 4, "method": "lowrank"}),
    ("bytes:20%", {"objective": "loss", "method": "bits"}),
]


@pytest.fixture
def _card(monkeypatch):
    with card(monkeypatch):
        yield


@pytest.fixture
def dense(tiny_vit, _card):
    return moved(tiny_vit())


@pytest.fixture
def many():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 5) for _ in range(5)]


@pytest.fixture
def stats(dense, many):
    return vitlr.calibrate(dense, many, objective=("fisher", "loss"), extras=("rounding",))


def places(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


def test_the_card_refuses_what_lies_on_the_host(dense, many):
    with pytest.raises(RuntimeError, match="same device: conv2d"):
        dense(many[0][0])
    answer = dense(many[0][0].to("cuda"))
    assert answer.device.type == "cuda" and answer.cpu().device.type == "cpu"
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        answer.detach().numpy()


def test_moments_are_summed_on_the_card_and_handed_back_on_the_host(dense, many):
    seen = set()

    def look(running):
        seen.update(tensor.device.type for layer in running.layers.values() for _, tensor in layer.sums())
        seen.update(lost.device.type for lost in running.others.values())

    stats = vitlr.calibrate(dense, many, objective="loss", extras=("rounding",), on_batch=look)
    assert seen == {"cuda"}
    assert {tensor.device.type for layer in stats.layers.values() for _, tensor in layer.sums()} == {"cpu"}
    assert {lost.device.type for lost in stats.others.values()} == {"cpu"}


def test_ranks_are_solved_on_the_card(dense, stats, monkeypatch):
    asked, solve_ranks = [], solving.solve_ranks
    monkeypatch.setattr(solving, "solve_ranks", lambda *given: asked.append(given[-1]) or solve_ranks(*given))
    solving.decompose(dense, stats, "loss")
    assert [torch.device(device).type for device in asked] == ["cuda"]


@pytest.mark.parametrize(("budget", "how"), PLANS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_plan_is_carried_out_and_judged_on_the_card(dense, stats, many, budget, how, tmp_path):
    plan = vitlr.plan(dense, stats, budget, **how)
    small = vitlr.apply(dense, plan)
    assert plan.changes and places(small) == {"cuda"}
    found = vitlr.evaluate(small, many, dense)
    assert found.images == 40 and found.kl is not None
    assert places(vitlr.to_dense(small)) == places(vitlr.unfuse(vitlr.fuse(small))) == {"cuda"}
    vitlr.save(small, tmp_path / "small.safetensors", plan=plan)
    assert places(vitlr.load(tmp_path / "small.safetensors", model=dense).to("cuda")) == {"cuda"}


@pytest.mark.parametrize(("budget", "how"), [PLANS[0], PLANS[2]], ids=["widths", "bits"])
def test_refinement_stays_on_the_card(dense, stats, many, budget, how):
    small = vitlr.apply(dense, vitlr.plan(dense, stats, budget, **how))
    rungs = ["distil"] if "bits" in how.values() else ["refit", "distil"]
    small = vitlr.refine(small, dense, many, rungs=rungs, steps=2, every=1, batch_size=4)
    assert places(small) == {"cuda"} and small(many[0][0].to("cuda")).device.type == "cuda"


def test_training_stays_on_the_card(dense, stats, many):
    small = vitlr.apply(dense, vitlr.plan(dense, stats, "params:60%", rank_step=4))
    train(small, many, reference=dense, epochs=1, warmup_epochs=0, lr=1e-4)
    assert places(small) == {"cuda"}
