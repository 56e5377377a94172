"""Promises of time: what a plan takes over what the table says, by one plan that was tried, and by two."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from vitlr.errors import InputError
from vitlr.planning.budgets import LATENCY, Budget, OutOfReach
from vitlr.planning.latency import Latency
from vitlr.surgery import promises

DENSE = 124.0


@dataclass(frozen=True)
class Planned:
    """All of a plan that is looked at here."""

    latency: Latency
    image: object = None


@pytest.fixture
def world(monkeypatch):
    """A function that says what plans take, by what the table says of them; a list of all that were tried."""
    tried = []

    def of(takes, least=0.0):
        def again(budget):
            if budget.amount < least:
                raise OutOfReach(f"the smallest plan takes {least} ms", least, None)
            return Planned(Latency(8, 1, "bfloat16", "here", DENSE, round(budget.amount, 4)))

        def timed(dense, small, latency, image):
            tried.append(latency)
            return latency.measured(DENSE, takes(latency.promised_ms / latency.correction))

        monkeypatch.setattr(promises, "timed", timed)
        monkeypatch.setattr(promises, "_tried", lambda model, plan: model)
        return again, tried

    return of


def goal(ms):
    return Budget(LATENCY, ms, relative=False)


def test_a_plan_that_takes_what_the_table_says_stays(world):
    again, tried = world(lambda said: 1.01 * said)
    plan = again(goal(60))
    assert promises.corrected(None, plan, goal(60), again) is plan and len(tried) == 1


def test_one_ratio_makes_up_for_what_is_in_proportion(world):
    again, tried = world(lambda said: 1.3 * said)
    found = promises.corrected(None, again(goal(60)), goal(60), again).latency
    assert found.promised_ms == pytest.approx(60, rel=1e-4) and found.correction == pytest.approx(1.3, rel=1e-3)
    assert len(tried) == 2 and 1.3 * found.promised_ms / found.correction == pytest.approx(60, rel=1e-3)


def test_two_plans_make_up_for_what_lies_between_layers(world):
    """In blocks of bytes less than in the dense model, whatever is cut."""
    again, tried = world(lambda said: 1.1 * said - 18)
    found = promises.corrected(None, again(goal(60)), goal(60), again).latency
    said = found.promised_ms / found.correction
    assert len(tried) == 2 and tried[1].promised_ms == pytest.approx(60, rel=1e-4)
    assert abs(1.1 * tried[1].promised_ms / tried[1].correction - 18 - 60) > 4  # one ratio alone
    assert 1.1 * said - 18 == pytest.approx(60, rel=1e-3) and found.promised_ms == pytest.approx(60, rel=1e-3)


def test_a_line_that_says_nothing_is_not_gone_by():
    assert promises._line([(60.0, 48.0)]) == (0.8, 0.0)
    assert promises._line([(60.0, 48.0), (75.0, 63.0)]) == pytest.approx((1.0, -12.0))
    assert promises._line([(60.0, 48.0), (60.0, 54.0)]) == (0.9, 0.0)
    assert promises._line([(60.0, 48.0), (75.0, 40.0)]) == (pytest.approx(40 / 75), 0.0)  # more in less time: disturbed


def test_what_the_table_holds_for_out_of_reach_is_tried(world):
    again, _ = world(lambda said: 0.8 * said, least=50.0)
    with pytest.raises(OutOfReach) as cause:
        again(goal(45))
    found = promises.within_reach(None, goal(45), again, cause.value).latency
    assert found.promised_ms == pytest.approx(45, rel=1e-3) and found.correction == pytest.approx(0.8, rel=1e-3)
    with pytest.raises(InputError, match=r"the smallest plan takes 50\.0 ms"):
        promises.within_reach(None, goal(39), again, cause.value)


def test_a_correction_beyond_reach_leaves_the_nearest_plan(world):
    again, _ = world(lambda said: 2.0 * said, least=50.0)
    plan = again(goal(60))
    assert promises.corrected(None, plan, goal(60), again) is plan
    assert replace(plan.latency, measured_dense_ms=DENSE, measured_ms=120.0).kept is False
