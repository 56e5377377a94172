"""Steps and minutes of the whole ladder: every rung an equal share of what is left, and a bar of its own."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

import vitlr
from vitlr.refinement import Recipe
from vitlr.refinement.judge import Distance
from vitlr.refinement.report import Rung
from vitlr.refinement.share import Share

ENDS = (Distance(1.0, 50.0), Distance(0.5, 60.0))


def rung(name: str, steps: int, seconds: float) -> Rung:
    return Rung(name, True, *ENDS, 8, steps, seconds)


def test_what_a_rung_leaves_goes_to_the_next():
    recipe = Recipe(steps=30, minutes=3.0, regrow_steps=100)
    assert Share.of(recipe, [], 3).steps == 10 and Share.of(recipe, [], 3).minutes == 1.0
    done = [rung("refit", 4, 30.0)]
    assert Share.of(recipe, done, 2).steps == 13 and Share.of(recipe, done, 2).minutes == 1.25
    done.append(rung("regrow", 600, 30.0))  # six layers
    last = Share.of(recipe, done, 1)
    assert last.steps == 20 and last.minutes == 2.0
    assert (last.bound(recipe).steps, last.bound(recipe).minutes) == (20, 2.0)
    assert Share.of(recipe, [rung("refit", 40, 900.0)], 1).bound(recipe).steps == 1


def test_without_steps_and_minutes_nothing_is_bound():
    share = Share.of(Recipe(), [], 3)
    assert not share.over(10**9) and share.most(7) == 7 and share.bound(Recipe()) == Recipe()


def test_time_that_is_over_ends_a_rung(monkeypatch):
    now = 0.0
    monkeypatch.setattr("vitlr.refinement.share.time.monotonic", lambda: now)
    share = Share(minutes=0.5)
    now = 29.0
    assert not share.over(0)
    now = 30.0
    assert share.over(0)


def test_every_rung_is_watched_with_its_own_total(pair, proxy_images, quick):
    dense, small = pair
    seen: dict[str, list[tuple[int, int | None]]] = {}

    @contextmanager
    def watch(label, total, unit):
        told = seen.setdefault(f"{label} in {unit}", [])
        yield lambda done, total: told.append((done, total))

    report = vitlr.refine(small, dense, proxy_images, watch=watch, **{**quick, "steps": 9}).vitlr_refinement
    assert list(seen) == ["refining, refit in modules", "refining, regrow in layers", "refining, distil in steps"]
    for told in seen.values():
        assert [done for done, _ in told][-1] == 3 and {total for _, total in told} == {3}
    assert [rung.steps for rung in report.rungs] == [3, 3 * quick["regrow_steps"], 3]
    assert all("its share was over after 3" in rung.note for rung in report.rungs[:2])


def test_the_same_share_after_an_interrupt(pair, proxy_images, quick, tmp_path):
    dense, small = pair
    options = {**quick, "steps": 9, "resume": tmp_path}

    def cut(done, total):
        if done == 3:
            raise KeyboardInterrupt

    for _ in range(2):  # once in each of the first two rungs: what they had done is not kept
        with pytest.raises(KeyboardInterrupt):
            vitlr.refine(small, dense, proxy_images, progress=cut, **options)
    report = vitlr.refine(small, dense, proxy_images, **options).vitlr_refinement
    assert [rung.steps for rung in report.rungs] == [3, 3 * quick["regrow_steps"], 3]
