"""`vitlr compress --refine`: what it reports and writes, how it goes on, what it refuses."""

from __future__ import annotations

import pytest
from commandline import KEYS, nothing_left

import vitlr
from vitlr.refinement import distil as distil_rung

QUICK = {"steps": 12, "lr": 0.001}  # of three rungs, each of which may take a third


@pytest.fixture
def refine(squeeze, image_folder, monkeypatch):
    """The arguments of a small `compress --refine` over forty images."""
    data = image_folder(images=8, name="forty")
    return lambda *flags, **options: squeeze(*flags, **{"data": data, "refine": "distil", **QUICK, **options})


def test_rungs_are_reported_and_recorded(run, refine, tmp_path):
    values = run(*refine("--json")).json
    assert list(values) == KEYS
    assert [rung["name"] for rung in values["rungs"]] == ["refit", "regrow", "distil"]
    for rung in values["rungs"]:
        assert rung["kept"] == (rung["after"]["kl"] < rung["before"]["kl"]) and rung["seconds"] > 0
    small = vitlr.load(tmp_path / "small.safetensors")
    recipe = small.vitlr_info["recipe"]
    assert recipe["refinement"]["rungs"] == values["rungs"] and recipe["refinement"]["held_out"] == 8
    assert recipe["images"] == 40 and sum(p.numel() for p in small.parameters()) == values["params_kept"]


def test_people_read_it_too(run, refine):
    answer = run(*refine(refine="refit", steps=None, lr=None))
    assert "judged on 8 held-out ones" in answer.out and "refit: KL" in answer.out
    assert "refining, refit: " in answer.err and "regrow" not in answer.out


def test_steps_bound_all_rungs_together_and_each_has_a_line_of_its_own(run, refine):
    answer = run(*refine("--json", steps=7))
    refit, regrow, distil = answer.json["rungs"]
    layers = regrow["steps"] // 200
    assert refit["steps"] == 2 and 1 <= layers <= 2 and distil["steps"] == 5 - layers
    for line in ("refit: 2 modules in", f"regrow: {layers} layers in", f"distil: {distil['steps']} steps in"):
        assert f"refining, {line}" in answer.err


def test_an_interrupted_run_goes_on(run, refine, tmp_path, monkeypatch):
    whole = tmp_path / "whole.safetensors"
    assert run(*refine(out=whole)).status == 0
    real = distil_rung.Distilling.add

    def interrupt(self, loss):
        if self.updates == 2:
            raise KeyboardInterrupt
        return real(self, loss)

    snapshots, stats = tmp_path / "snapshots", tmp_path / "stats.safetensors"
    monkeypatch.setattr(distil_rung.Distilling, "add", interrupt)
    answer = run(*refine(resume=snapshots, stats=stats))
    assert answer.status == 130 and str(snapshots) in answer.err and nothing_left(tmp_path, "small.safetensors")
    assert "--resume" in run(*refine()).err
    monkeypatch.setattr(distil_rung.Distilling, "add", real)
    assert run(*refine(resume=snapshots, stats=stats)).status == 0
    first, second = (vitlr.load(path).state_dict() for path in (whole, tmp_path / "small.safetensors"))
    assert all((first[key] == second[key]).all() for key in first)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"refine": "all"}, "unknown rung 'all'"),
        ({"refine": "none"}, "--steps goes with --refine"),
        ({"refine": "none", "steps": None}, "--lr goes with --refine"),
        ({"refine": "regrow"}, "--lr goes with --refine distil"),
        ({"data": None}, "--data is missing"),
        ({"minutes": -1}, "--minutes -1"),
        ({"lr": -1}, "--lr -1"),
    ],
)
def test_bad_usage_is_refused_early(refused, refine, unread, options, said):
    assert said in refused(*refine(**options))


def test_more_bad_usage(refused, refine, squeeze, tmp_path, unread):
    assert "--plan-only makes none" in refused(*refine("--plan-only", out=None))
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(*refine(resume=tmp_path / "file"))
    assert "--refine needs images" in refused(*refine(data=None, stats=tmp_path / "file"))


def test_too_few_images(run, refine):
    answer = run(*refine(limit=20))
    assert answer.status == 2 and "20 images, expected at least 32" in answer.err


def test_a_budget_that_all_layers_fit_into_leaves_nothing_to_repair(run, refine):
    assert run(*refine("--json", budget="params:100%")).json["rungs"] == []
