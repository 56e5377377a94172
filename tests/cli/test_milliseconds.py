"""`vitlr compress --budget latency:`: flags, what is said of time, and what is refused."""

from __future__ import annotations

import json

import pytest
from fake_clock import FakeClock

import vitlr
from vitlr.measuring import clock
from vitlr.nn import FusedAttention


@pytest.fixture(autouse=True)
def _ticking(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(clock, "race", FakeClock(17))


def test_what_was_promised_and_measured_is_said_and_kept(run, squeeze, tmp_path):
    answer = run(*squeeze("--threads", "1", "--json", budget="latency:60%"))
    told = answer.json["latency"]
    assert (told["batch_size"], told["threads"], told["dtype"]) == (8, 1, "float32")
    assert told["measured_ms"] <= 0.61 * told["measured_dense_ms"] and told["promised_ms"] <= 0.6 * told["dense_ms"]
    assert "timing: " in answer.err and "shapes" in answer.err
    small = vitlr.load(tmp_path / "small.safetensors")
    assert isinstance(small.blocks[0].attn, FusedAttention)
    assert small.vitlr_info["plan"]["latency"] == told
    assert answer.json["bytes"] == (tmp_path / "small.safetensors").stat().st_size


def test_a_plan_alone_is_shown_with_its_promise(run, squeeze, tmp_path):
    plan = tmp_path / "plan.json"
    flags = squeeze("--plan-only", "--plan-out", plan, budget="latency:40ms", out=None, batch_size=None)
    assert "promised; batch 1, " in run(*flags).out
    assert json.loads(plan.read_text())["latency"]["measured_ms"] is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--budget", "latency:5"), "write latency:5ms or latency:5%"),
        (("--budget", "latency:5MB"), "MB is no unit of latency"),
        (("--budget", "params:5ms"), "ms is no unit of params"),
        (("--budget", "latency:60%", "--bits", "8"), "--bits '8' counts stored bytes"),
        (("--budget", "latency:60%", "--rounds", "2"), "--rounds 2 counts what is counted, not times"),
        (("--budget", "latency:60%", "--threads", "0"), "--threads 0, expected a whole number from 1"),
        (("--budget", "latency:60%", "--uniform"), "--uniform does not go with a budget of latency"),
        (("--threads", "1"), "--threads goes with a budget of latency"),
    ],
)
def test_what_goes_nowhere_is_refused_before_anything_is_read(refused, squeeze, unread, flags, said):
    assert said in refused(*squeeze(*flags))


def test_more_threads_than_cores_and_a_budget_out_of_reach_are_refused(run, refused, squeeze):
    assert "this process may use" in refused(*squeeze("--budget", "latency:60%", "--threads", "5000"))
    answer = run(*squeeze("--plan-only", budget="latency:1us", out=None))
    said = answer.err.splitlines()[-1]
    assert answer.status == 2 and "latency:0.001ms cannot be reached" in said and " ms of " in said
