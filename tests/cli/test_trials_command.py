"""`vitlr compress --trials`: parts of the plan are tried, and a run that was cut short goes on from what was."""

from __future__ import annotations

import pytest

import vitlr
from vitlr.refinement import trials


@pytest.fixture
def line(squeeze, image_folder):
    """The arguments of a run on images enough to try by."""
    data = image_folder(images=8, name="more")
    return lambda *flags, **more: squeeze(*flags, **{"data": data, "method": "joint", "budget": "params:60%", **more})


def test_a_run_that_was_interrupted_goes_on(run, line, tmp_path, monkeypatch):
    kept, carried_out, runs = tmp_path / "kept", trials.apply, []

    def cut(model, plan):
        runs.append(plan)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return carried_out(model, plan)

    monkeypatch.setattr(trials, "apply", cut)
    answer = run(*line(trials=1, resume=kept))
    assert answer.status == 130 and str(kept) in answer.err and not (tmp_path / "small.safetensors").exists()
    done = run(*line("--json", trials=1, resume=kept))
    assert done.status == 0 and done.json["params_kept"] <= 0.6 * done.json["params"]
    assert "trying: " in answer.err + done.err and (kept / "trials_0.safetensors").exists()
    assert vitlr.load(tmp_path / "small.safetensors") is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trials": 9}, "--trials 9, expected a whole number from 0 to 8"),
        ({"trials": 1, "bits": 8}, "it does not go with --bits"),
        ({"trials": 1, "budget": "latency:50%"}, "a budget of latency"),
        ({"resume": "kept"}, "--resume goes with --trials, and --refine"),
    ],
)
def test_bad_usage_is_refused_early(refused, line, unread, options, said):
    assert said in refused(*line(**options))


def test_statistics_alone_are_none_to_try_by(refused, line, unread, tmp_path):
    (tmp_path / "s").write_text("")
    assert "--trials 1 needs images to try the plan on" in refused(*line(data=None, stats=tmp_path / "s", trials=1))
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(*line(trials=1, resume=tmp_path / "file"))


def test_too_few_images(run, line):
    answer = run(*line(trials=1, limit=20))
    assert answer.status == 2 and "20 images, expected at least 32" in answer.err
