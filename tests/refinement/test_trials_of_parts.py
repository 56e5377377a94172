"""Trials: parts of a plan are put back one by one, and what each costs makes the next plan."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

import vitlr
from vitlr.compression import compressed
from vitlr.errors import InputError
from vitlr.refinement import trials
from vitlr.refinement.images import Proxy
from vitlr.refinement.judge import Judge
from vitlr.refinement.trials import Part, Snapshots, Trial, changed, corrections, parts_of, tried, without
from vitlr.runtime.progress import shown
from vitlr.surgery.application import apply

HOW = {"method": "joint", "width_step": 8, "rank_step": 4}


def watch(label, total=None, unit="images"):
    return shown(None, label, total, unit)


@pytest.fixture
def dense(pair):
    return pair[0]


@pytest.fixture
def stats(dense, proxy_images):
    return vitlr.calibrate(dense, proxy_images, objective="loss")


@pytest.fixture
def plan(dense, stats):
    return vitlr.plan(dense, stats, "params:45%", **HOW)


@pytest.fixture
def judge(dense, proxy_images):
    return Judge(dense, Proxy(proxy_images).held, 8)


def kept(plan, dense, folder=None):
    return Snapshots.of(folder, plan, dense, "00000000")


def test_parts_are_mlps_attentions_and_what_is_left(plan):
    parts = parts_of(plan)
    linears = [name for part in parts.values() for name in part.linears]
    assert sorted(linears) == sorted(row.name for row in plan.layers)
    assert {part.kind for part in parts.values()} == {"mlp", "query_keys", "blocks.*.attn.proj"}
    assert any(changed(plan, name, part) for name, part in parts.items())


def test_put_back_a_part_is_dense_and_all_else_stays(plan, dense, judge):
    small = apply(dense, plan)
    for name, part in parts_of(plan).items():
        if not changed(plan, name, part):
            continue
        other = apply(dense, without(plan, name, part))
        for linear in part.linears:
            assert torch.equal(other.get_submodule(linear).weight, dense.get_submodule(linear).weight)
        rest = {key for key in small.state_dict() if not any(key.startswith(f"{linear}.") for linear in part.linears)}
        assert all(torch.equal(other.state_dict()[key], small.state_dict()[key]) for key in rest)
        assert judge.each(other).mean() != judge.each(small).mean()
    everything = plan
    for name, part in parts_of(plan).items():
        everything = without(everything, name, part)
    assert judge(apply(dense, everything)).kl < 1e-12


def test_the_judge_says_of_every_image_what_it_says_of_all(dense, plan, judge):
    small = apply(dense, plan)
    each = judge.each(small)
    assert each.shape == (len(judge.images),) and each.dtype == torch.float64
    assert float(each.mean()) == pytest.approx(judge(small).kl, rel=1e-12)
    with torch.no_grad():
        small.head.bias[0] = math.nan
    assert torch.isinf(judge.each(small)).all()


def test_corrections_are_measured_ratios_drawn_to_those_of_their_kind():
    parts = {name: Part(name[0], frozenset([name])) for name in ("a1", "a2", "a3", "b1", "c1")}
    exact = {"a1": Trial(1.0, 2.0, 1e-9), "a2": Trial(1.0, 4.0, 1e-9), "b1": Trial(2.0, 2.0, 1e-9)}
    found = corrections(exact, parts)
    assert found["a1"] == pytest.approx(2.0) and found["a2"] == pytest.approx(4.0) and found["b1"] == pytest.approx(1.0)
    assert found["a3"] == pytest.approx(3.0)  # its kind's
    assert found["c1"] == pytest.approx(2.0)  # that of all: 8 / 4
    vague = corrections({**exact, "a1": Trial(1.0, 2.0, 1e9), "a2": Trial(1.0, 4.0, 1e9)}, parts)
    assert vague["a1"] == pytest.approx(3.0) and vague["a2"] == pytest.approx(3.0)
    half = corrections({"a1": Trial(1.0, 2.0, 1.5), "a2": Trial(1.0, 4.0, 1e9)}, parts)
    assert half["a1"] == pytest.approx(2.5)  # as uncertain as its kind is spread: 3 / 2
    far = corrections({"a1": Trial(1.0, -5.0, 1e-9), "a2": Trial(1.0, 15.0, 1e-9), "b1": Trial(1.0, -11.0, 1.0)}, parts)
    assert far == {}  # all in all it gains
    low = corrections({"a1": Trial(1.0, 9.0, 1e-9), "b1": Trial(1.0, -1.0, 1e9)}, parts)
    assert low["b1"] == pytest.approx(0.4)  # a tenth of that of all, which is 4
    assert corrections({"a1": Trial(1.0, 0.1, 1e-9), "a2": Trial(1.0, 5.9, 1e-9)}, parts)["a1"] == pytest.approx(1.0)


@pytest.mark.parametrize("useless", [{}, {"a1": Trial(0.0, 1.0, 0.1)}, {"a1": Trial(1.0, math.nan, math.inf)}])
def test_trials_that_say_nothing_correct_nothing(useless):
    assert corrections(useless, {"a1": Part("a", frozenset(["a1"]))}) == {}


def test_what_counts_double_is_spared(dense, stats, plan):
    mlp = next(row for row in plan.widths if row.kind == "mlp" and row.width < row.full_width)
    spared = vitlr.plan(dense, stats, "params:45%", **HOW, corrections={mlp.name: 50.0})
    width = {row.name: row.width for row in spared.widths}
    assert width[mlp.name] > mlp.width and spared.params_kept <= 0.45 * spared.params
    alike = vitlr.plan(dense, stats, "params:45%", **HOW, corrections=dict.fromkeys(parts_of(plan), 3.0))
    assert alike.narrowed == plan.narrowed and alike.ranks == plan.ranks
    assert alike.error == pytest.approx(3 * plan.error, rel=1e-6)


def test_the_nearest_of_the_plans_is_taken(dense, stats, plan, judge):
    made = []

    def again(factors):
        made.append(vitlr.plan(dense, stats, "params:45%", **HOW, corrections=factors))
        return made[-1]

    best = tried(dense, plan, judge, again, times=2, kept=kept(plan, dense), watch=watch)
    distances = [judge(apply(dense, one)).kl for one in (plan, *made)]
    assert len(made) == 2 and judge(apply(dense, best)).kl == min(distances)
    worse = vitlr.plan(dense, stats, "params:35%", **HOW)
    same = tried(dense, plan, judge, lambda factors: worse, times=1, kept=kept(plan, dense), watch=watch)
    assert same is plan


def test_a_run_that_was_cut_short_goes_on(dense, stats, plan, judge, tmp_path, monkeypatch):
    def again(factors):
        return vitlr.plan(dense, stats, "params:45%", **HOW, corrections=factors)

    whole = tried(dense, plan, judge, again, times=1, kept=kept(plan, dense, tmp_path / "whole"), watch=watch)
    runs, carried_out = [], trials.apply

    def cut(model, plan):
        runs.append(plan)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return carried_out(model, plan)

    monkeypatch.setattr(trials, "apply", cut)
    with pytest.raises(KeyboardInterrupt):
        tried(dense, plan, judge, again, times=1, kept=kept(plan, dense, tmp_path / "cut"), watch=watch)
    done = tried(dense, plan, judge, again, times=1, kept=kept(plan, dense, tmp_path / "cut"), watch=watch)
    count = sum(changed(plan, name, part) for name, part in parts_of(plan).items())
    assert len(runs) == 3 + (1 + count - 2) + 1  # the third was cut; what was left of the plan and its parts; the next
    assert done == whole
    other = vitlr.plan(dense, stats, "params:70%", **HOW)
    with pytest.raises(InputError, match="of another run: its plan"):
        tried(dense, other, judge, again, times=1, kept=kept(other, dense, tmp_path / "cut"), watch=watch)


def test_compressed_in_one_call_leaves_the_model_alone_and_says_what_it_tries(dense, proxy_images, tmp_path):
    before, told = copy.deepcopy(dense.state_dict()), []

    def heard(label, total=None, unit="images"):
        told.append((label, unit))
        return shown(None, label, total, unit)

    how = {**HOW, "objective": "loss", "hidden": True}
    done = compressed(dense, proxy_images, "params:45%", trials=1, watch=heard, resume=tmp_path / "kept", **how)
    plain = compressed(dense, proxy_images, "params:45%", **how)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert told.count(("trying", "plans")) == 2 and done.plan.params_kept <= 0.45 * done.plan.params
    judge = Judge(dense, Proxy(proxy_images).held, 8)
    assert judge(done.model).kl <= judge(plain.model).kl
    assert json.loads(done.plan.to_json())["schema"] == json.loads(plain.plan.to_json())["schema"]
    once_more = compressed(dense, proxy_images, "params:45%", trials=1, resume=tmp_path / "kept", **how)
    assert once_more.plan == done.plan
    rounds = compressed(dense, proxy_images, "params:45%", trials=1, rounds=2, **how)
    assert rounds.plan.params_kept <= 0.45 * rounds.plan.params and len(rounds.plan.earlier) == 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"trials": -1}, "trials=-1, expected a whole number from 0 to 8"),
        ({"trials": True}, "trials=True, expected"),
        ({"trials": 1, "bits": 8}, "it does not go with bits="),
        ({"trials": 1, "method": "mix", "budget": "bytes:30%"}, "it does not go with bits="),
        ({"trials": 1, "budget": "latency:50%"}, "a budget of latency"),
        ({"trials": 1, "uniform": True}, "uniform=True"),
        ({"trials": 1, "corrections": {"blocks.0.mlp": 1.0}}, "corrections="),
        ({"corrections": {"blocks.9.mlp": 1.0}}, "names 'blocks.9.mlp', which is no layer"),
        ({"corrections": {"blocks.0.mlp": 0.0}}, "a factor of 0.0, expected a number above 0"),
        ({"corrections": {"blocks.0.mlp": math.nan}}, "a factor of nan"),
        ({"corrections": {"blocks.0.mlp": "2"}}, "a factor of '2'"),
    ],
)
def test_what_does_not_go_together_is_refused(dense, proxy_images, how, said):
    budget = {"budget": "params:60%", **how}.pop("budget")
    with pytest.raises(InputError) as refused:
        compressed(dense, proxy_images, budget, **{key: value for key, value in how.items() if key != "budget"})
    assert said in str(refused.value)


def test_too_few_images_and_none_are_refused(dense, stats, proxy_images, tmp_path):
    with pytest.raises(InputError, match="gives 10 images, expected at least 32"):
        compressed(dense, [proxy_images[-1]], "params:60%", trials=1, objective="loss")
    with pytest.raises(InputError, match="refinement, trials, and more rounds than one need images"):
        compressed(dense, None, "params:60%", trials=1, measure=lambda model: stats)
