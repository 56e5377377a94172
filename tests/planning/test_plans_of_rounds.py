"""Plans of several rounds: what their file holds, that it makes the same model again, and what is refused."""

import json

import pytest
import torch

import vitlr
from vitlr.compression import compressed
from vitlr.errors import InputError

STEPS = {"rank_step": 4, "width_step": 8}


@pytest.fixture
def proxy():
    return [torch.randn(16, 3, 32, 32) for _ in range(2)]


@pytest.fixture
def made(tiny_vit, proxy):
    """The dense model, and what came of it."""

    def made(rounds=2):
        model = tiny_vit()
        return model, compressed(model, proxy, "params:55%", method="joint", rounds=rounds, **STEPS)

    return made


@pytest.mark.parametrize("rounds", [2, 3])
def test_the_file_makes_the_same_model_again(made, proxy, images, tmp_path, rounds):
    model, done = made(rounds)
    done.plan.save(tmp_path / "plan.json")
    plan = vitlr.Plan.load(tmp_path / "plan.json")
    assert plan == done.plan and plan.to_json() == done.plan.to_json()
    assert [one.method for one in plan.earlier] == ["widths"] * (rounds - 1)
    assert plan.budget == "params:55%" and plan.params == sum(p.numel() for p in model.parameters())
    seen = []

    def measure(network):
        seen.append(network)
        return vitlr.calibrate(network, proxy, hidden=True)

    before = [p.clone() for p in model.parameters()]
    again = vitlr.apply(model, plan, measure=measure)
    assert torch.equal(again(images), done.model(images)) and len(seen) == rounds and seen[0] is model
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    stats = vitlr.calibrate(model, proxy, hidden=True)
    with_first = vitlr.apply(model, plan, stats, measure=measure, inplace=True)
    assert with_first is model and torch.equal(model(images), again(images)) and len(seen) == 2 * rounds - 1


def test_a_plan_just_made_is_carried_out_like_one_that_was_read(made, proxy, images):
    model, done = made()
    again = vitlr.apply(model, done.plan, measure=lambda network: vitlr.calibrate(network, proxy, hidden=True))
    assert torch.equal(again(images), done.model(images))
    assert "1 earlier round of widths left" in str(done.plan)
    assert max(map(len, str(done.plan).splitlines())) <= 80


def test_last_bits_of_a_round_may_differ(made, proxy):
    """Another machine's first round does not have the weights of which the second one speaks."""
    model, done = made()
    body = done.plan.to_dict()
    body["fingerprint"] = "0" * 16
    again = vitlr.apply(
        model, vitlr.Plan.from_dict(body), measure=lambda network: vitlr.calibrate(network, proxy, hidden=True)
    )
    assert sum(p.numel() for p in again.parameters()) == done.plan.params_kept


def test_a_plan_of_one_round_is_measured_for_where_nothing_is_at_hand(made, proxy, images):
    model, done = made(1)
    plan = vitlr.Plan.from_json(done.plan.to_json())
    assert not plan.earlier and plan.to_dict()["schema"] == 3 and "earlier" not in plan.to_dict()
    again = vitlr.apply(model, plan, measure=lambda network: vitlr.calibrate(network, proxy, hidden=True))
    assert torch.equal(again(images), done.model(images))


def test_what_rounds_are_not_carried_out_with_is_refused(made, tiny_vit, proxy):
    model, done = made()
    plan = vitlr.Plan.from_json(done.plan.to_json())
    before = [p.clone() for p in model.parameters()]
    stats = vitlr.calibrate(model, proxy, hidden=True)
    with pytest.raises(InputError, match=r"this plan has 2 rounds, each from statistics of the model .* pass measure="):
        vitlr.apply(model, plan, stats, inplace=True)
    with pytest.raises(InputError, match="these statistics are of other weights"):  # the dense ones, once more
        vitlr.apply(model, plan, measure=lambda network: stats)
    with pytest.raises(InputError, match="this plan is of another model or of other weights"):
        vitlr.apply(done.model, plan, measure=lambda network: vitlr.calibrate(network, proxy, hidden=True))
    with pytest.raises(InputError, match="no hidden"):
        vitlr.apply(model, plan, measure=lambda network: vitlr.calibrate(network, proxy, hidden=False))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda body: body.update(earlier=[]), "expected a list of 1 to 7"),
        (lambda body: body.update(earlier=body["earlier"] * 8), "expected a list of 1 to 7"),
        (lambda body: body.update(earlier="widths"), "expected a list of 1 to 7"),
        (lambda body: body.update(earlier=[7]), "this is not a vitlr plan"),
        (lambda body: body["earlier"][0].update(method="joint"), "round 1 of this plan has method 'joint'"),
        (lambda body: body["earlier"][0].update(earlier=[dict(body["earlier"][0])]), "has rounds of its own"),
        (lambda body: body["earlier"][0]["widths"][0].update(width=10**6), "does not fit"),
        (lambda body: body["earlier"][0].update(fingerprint=3), "fingerprint 3, expected text"),
        (lambda body: body.update(schema=7), "has schema 7, this vitlr reads up to 6"),
    ],
)
def test_a_tampered_file_is_refused(made, change, said):
    _, done = made()
    body = json.loads(done.plan.to_json())
    change(body)
    with pytest.raises(InputError, match=said):
        vitlr.Plan.from_dict(body)


def test_rounds_that_do_not_follow_each_other_are_refused(made, proxy):
    model, done = made()
    body = done.plan.to_dict()
    row = next(row for row in body["earlier"][0]["widths"] if row["width"] < row["full_width"])
    row["width"] -= 8
    with pytest.raises(InputError, match="the plan is of another model: no"):
        vitlr.apply(
            model, vitlr.Plan.from_dict(body), measure=lambda network: vitlr.calibrate(network, proxy, hidden=True)
        )
