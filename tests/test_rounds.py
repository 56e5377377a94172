"""Rounds: what is measured again, what the model then costs, what is refused."""

import pytest
import torch

import vitlr
from vitlr import compression
from vitlr.anatomy.mlps import narrowed_mlps
from vitlr.errors import InputError
from vitlr.measuring import cost

STEPS = {"rank_step": 4, "width_step": 8}


@pytest.fixture
def proxy():
    return [torch.randn(16, 3, 32, 32) for _ in range(2)]


@pytest.mark.parametrize("method", ["widths", "joint"])
@pytest.mark.parametrize("budget", ["params:60%", "macs:65%", "bytes:120kB"])
@pytest.mark.parametrize("rounds", [2, 3])
def test_the_budget_is_that_of_the_dense_model(tiny_vit, proxy, method, budget, rounds, monkeypatch):
    seen = []

    def watched(model, *args, **options):
        seen.append(cost.measure(model, (3, 32, 32)))
        return vitlr.calibrate(model, *args, **options)

    monkeypatch.setattr(compression, "calibrate", watched)
    model = tiny_vit()
    before = [p.clone() for p in model.parameters()]
    small = vitlr.compress(model, proxy, budget, method=method, rounds=rounds, **STEPS)
    quantity, whole = budget.partition(":")[0], seen[0]
    limit = vitlr.parse_budget(budget).limit(getattr(whole, quantity))
    now = cost.measure(small, (3, 32, 32))
    assert getattr(now, quantity) <= limit
    left = [getattr(each, quantity) for each in seen]
    assert len(left) == rounds and left == sorted(left, reverse=True) and len(set(left)) == rounds
    for done, has in enumerate(left):  # equal ratios, but for the steps of widths
        assert 0.93 < has / (left[0] * (limit / left[0]) ** (done / rounds)) <= 1
    assert narrowed_mlps(small) and not narrowed_mlps(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_is_measured_again_decides(tiny_vit, proxy, images):
    """The second plan is made from the narrowed model, in place of the first one's predictions."""
    model = tiny_vit()
    one, two = (vitlr.compress(model, proxy, "params:55%", method="joint", rounds=r, seed=3, **STEPS) for r in (1, 2))
    again = vitlr.compress(model, proxy, "params:55%", method="joint", rounds=2, seed=3, **STEPS)
    assert torch.equal(two(images), again(images)) and not torch.allclose(one(images), two(images))
    stats = vitlr.calibrate(model, proxy, hidden=True, seed=3)
    whole = cost.count_params(model)
    first = vitlr.apply(
        model, vitlr.plan(model, stats, f"params:{int(whole * 0.55**0.5)}", method="widths", width_step=8)
    )
    stats = vitlr.calibrate(first, proxy, hidden=True, seed=3)
    by_hand = vitlr.apply(first, vitlr.plan(first, stats, f"params:{int(whole * 0.55)}", method="joint", **STEPS))
    torch.testing.assert_close(by_hand(images), two(images))
    inplace = vitlr.compress(model, proxy, "params:55%", method="joint", rounds=2, seed=3, inplace=True, **STEPS)
    assert inplace is model and torch.equal(model(images), two(images))


def test_refinement_compares_with_the_dense_model(tiny_vit):
    images = [torch.randn(40, 3, 32, 32)]
    quick = {"steps": 2, "every": 1, "batch_size": 8, "amp": False}
    for inplace in (False, True):
        small = vitlr.compress(
            tiny_vit(),
            images,
            "params:70%",
            method="joint",
            rounds=2,
            rungs=["distil"],
            inplace=inplace,
            **quick,
            **STEPS,
        )
        assert small.vitlr_refinement.rungs[-1].name == "distil"


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rounds": 2, "method": "lowrank"}, r"rounds=2 narrows MLPs .* method='lowrank'"),
        ({"rounds": 2, "method": "widths+ranks"}, r"method='widths\+ranks'"),
        ({"rounds": 0, "method": "joint"}, "rounds=0, expected a whole number from 1 to 8"),
        ({"rounds": 9, "method": "joint"}, "rounds=9, expected a whole number from 1 to 8"),
        ({"rounds": 1.5, "method": "joint"}, "rounds=1.5, expected"),
    ],
)
def test_rounds_that_make_no_sense(tiny_vit, options, said):
    def unread():
        raise AssertionError("too late")
        yield

    with pytest.raises(InputError, match=said):
        vitlr.compress(tiny_vit(), unread(), "params:60%", **options)
    with pytest.raises(InputError, match="uses this loader up"):
        vitlr.compress(tiny_vit(), unread(), "params:60%", method="joint", rounds=2)
    with pytest.raises(InputError, match="no budget"):
        vitlr.compress(tiny_vit(), unread(), method="widths", prune_rate=0.3, rounds=2)
