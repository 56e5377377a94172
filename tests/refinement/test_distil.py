"""The rung distil: repeatable, resumable to the bit, and calm when numbers fail."""

from __future__ import annotations

import math

import pytest
import torch
from test_ladder import same

import vitlr
from vitlr import InputError
from vitlr.nn import LowRankLinear
from vitlr.refinement import Recipe
from vitlr.refinement import distil as distil_rung
from vitlr.refinement.distil import Distilling, rate
from vitlr.refinement.images import Proxy
from vitlr.refinement.judge import Distance, Judge
from vitlr.training import state as training_state


@pytest.fixture
def distil(pair, proxy_images, quick):
    dense, small = pair

    def run(**options):
        return vitlr.refine(small, dense, proxy_images, rungs=["distil"], **{**quick, **options})

    return run


def test_the_seed_decides(distil):
    first = distil()
    assert same(first, distil()) and not same(first, distil(seed=1))


def test_one_step_is_that_of_plain_torch(pair, proxy_images, quick, distil, monkeypatch):
    """Clipped gradient, AdamW at the warm-up's first rate, and the running mean of start and step."""
    dense, small = pair
    for module in small.modules():
        if isinstance(module, LowRankLinear):
            module.balance()
    quick |= {"steps": 1, "every": 1, "warmup": 4, "lr": 0.05, "clip": 1e-7, "features": 0.0, "weight_decay": 0.1}
    falling = iter(range(9, 0, -1))
    monkeypatch.setattr(Judge, "__call__", lambda self, model: Distance(next(falling), None))  # whatever comes is kept
    refined = distil(**quick)
    images = next(Proxy(proxy_images).mixed(8, 0, 0, Recipe.crop, Recipe.color_jitter, True))
    start = [p.detach().clone() for p in small.parameters()]
    loss = torch.nn.functional.kl_div(
        small.eval()(images).log_softmax(1), dense.eval()(images).log_softmax(1), log_target=True, reduction="batchmean"
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(small.parameters(), 1e-7)  # below AdamW's eps, which would hide any other scale
    torch.optim.AdamW(small.parameters(), lr=0.05 / 1.5, weight_decay=0.1).step()  # half a step warms up
    with torch.no_grad():
        for p, was in zip(small.parameters(), start, strict=True):
            p.copy_(was + 0.9 * (p - was))
    expected = vitlr.to_dense(small).state_dict()  # balancing twice may turn signs
    for name, found in vitlr.to_dense(refined).state_dict().items():
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-4)


def test_the_rate_warms_up_and_falls_as_a_cosine():
    def rates(total):
        return [rate(k, total, warmup=4) for k in range(total or 8)]

    assert rates(24)[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert rates(24)[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 20)) for k in range(20)])
    assert rates(4)[:2] == pytest.approx([1 / 3, 2 / 3]) and rates(4)[2] == 1.0  # at most half of a short run warms up
    assert rates(None)[4:] == [1.0] * 4  # as long as the length is not known


def test_factors_are_balanced_first(pair, distil):
    expected = distil().vitlr_refinement.rungs[0].after.kl
    for module in pair[1].modules():
        if isinstance(module, LowRankLinear):
            module.up.weight.data *= 64
            module.down.weight.data /= 64
    assert distil().vitlr_refinement.rungs[0].after.kl == pytest.approx(expected, rel=1e-2)


class Cut(Exception):
    pass


@pytest.mark.parametrize("at", [3, 8, 17])
def test_an_interrupted_run_goes_on_to_the_same_bits(distil, tmp_path, at):
    whole = distil()

    def cut(done, total):
        if done == at:
            raise Cut

    with pytest.raises(Cut):
        distil(resume=tmp_path / "snapshots", progress=cut)
    steps = []
    resumed = distil(resume=tmp_path / "snapshots", progress=lambda done, total: steps.append(done))
    assert steps[0] == at // 8 * 8 + 1 and steps[-1] == 24
    assert same(resumed, whole)
    assert resumed.vitlr_refinement.rungs[0].after == whole.vitlr_refinement.rungs[0].after
    again = distil(resume=tmp_path / "snapshots", progress=lambda *_: pytest.fail("it had finished"))
    assert same(again, whole)
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["after_distil.safetensors"]


def test_a_snapshot_that_holds_less_than_is_needed_is_refused(distil, tmp_path, monkeypatch):
    def cut(done, total):
        if done == 9:
            raise Cut

    with monkeypatch.context() as earlier, pytest.raises(Cut):
        earlier.setattr(Distilling, "values", ("note",))
        distil(resume=tmp_path, progress=cut)
    with pytest.raises(InputError, match=r"distil.safetensors was kept in the middle of a run by an earlier vitlr"):
        distil(resume=tmp_path)


def test_snapshots_of_another_run_are_refused(distil, tmp_path):
    distil(resume=tmp_path)
    with pytest.raises(InputError, match="another run: its recipe seed was 0, now it is 1; name another folder"):
        distil(resume=tmp_path, seed=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot keep snapshots"):
        distil(resume=tmp_path / "file")
    (tmp_path / "after_distil.safetensors").write_text("cut short")
    with pytest.raises(InputError, match="not a whole"):
        distil(resume=tmp_path)


def test_a_loss_that_is_no_number_ends_it_with_the_best_so_far(distil, monkeypatch):
    real, calls = distil_rung.divergence, []

    def sick(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) > 13 else 1)

    monkeypatch.setattr(distil_rung, "divergence", sick)
    rung = (refined := distil()).vitlr_refinement.rungs[0]
    assert "nan at step 14" in rung.note and rung.steps == 14 and rung.kept and rung.after.kl < rung.before.kl
    monkeypatch.setattr(distil_rung, "divergence", real)
    assert all(torch.isfinite(p).all() for p in refined.parameters())
    calls += [1] * 13
    monkeypatch.setattr(distil_rung, "divergence", sick)
    rung = distil().vitlr_refinement.rungs[0]
    assert "nan at step 1" in rung.note and not (rung.after.kl > rung.before.kl + 1e-6)


def test_on_a_device_that_runs_behind_it_is_found_where_images_are_looked_at(distil, monkeypatch):
    real, calls = distil_rung.divergence, []

    def sick(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) > 13 else 1)

    monkeypatch.setattr(training_state, "read_freely", lambda t: False)
    monkeypatch.setattr(distil_rung, "divergence", sick)
    rung = (refined := distil()).vitlr_refinement.rungs[0]
    assert "the loss was no number at step 14" in rung.note and rung.kept and rung.after.kl < rung.before.kl
    assert all(torch.isfinite(p).all() for p in refined.parameters())


def test_a_diverging_run_gives_back_what_it_got(distil):
    refined = distil(lr=10.0, ema=0.0, patience=2)
    rung = refined.vitlr_refinement.rungs[0]
    assert rung.after.kl <= rung.before.kl + 1e-6
    assert rung.steps < 24 and ("no gain" in rung.note or "stopped" in rung.note)


def test_a_parameter_that_no_gradient_reaches_is_left_alone(pair, proxy_images, quick, tmp_path):
    dense, small = pair
    small.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    refined = vitlr.refine(small, dense, proxy_images, rungs=["distil"], resume=tmp_path, **quick)
    assert refined.vitlr_refinement.rungs[0].kept and torch.equal(refined.unused, torch.ones(3))


def test_a_loss_that_no_parameter_moves_is_refused(pair, proxy_images, quick):
    dense, small = pair
    small.requires_grad_(False).register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(InputError, match="no gradient reaches a parameter that is not frozen"):
        vitlr.refine(small, dense, proxy_images, rungs=["distil"], **quick)


def test_minutes_become_steps(distil, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(distil_rung.time, "monotonic", lambda: next(clock) * 0.5)
    # A judgement takes one tick (half a second) and is shared by 8 steps; the five steps that are timed take one tick.
    assert distil(minutes=0.1, steps=None, patience=99).vitlr_refinement.rungs[0].steps == int(6 / (0.5 / 5 + 0.5 / 8))
    assert distil(minutes=0.1, steps=9, patience=99).vitlr_refinement.rungs[0].steps == 9


def test_autocast_and_a_temperature_run(distil):
    for options in ({"amp": True, "temperature": 2.0}, {"features": 0.0, "mixup": False, "weight_decay": 0.1}):
        rung = distil(**options).vitlr_refinement.rungs[0]
        assert rung.kept and rung.after.kl < rung.before.kl, options


def test_balancing_changes_no_product():
    A, B = torch.randn(12, 4, dtype=torch.float64) * 100, torch.randn(4, 9, dtype=torch.float64) / 100
    layer = LowRankLinear.from_factors(A, B)
    layer.balance()
    torch.testing.assert_close(layer.up.weight @ layer.down.weight, A @ B)
    sizes = [torch.linalg.svdvals(f.detach()) for f in (layer.up.weight, layer.down.weight)]
    torch.testing.assert_close(*sizes)


def test_attention_is_given_back(distil, pair):
    dense, _ = pair
    before = [m.fused_attn for m in dense.modules() if hasattr(m, "fused_attn")]
    after = [m.fused_attn for m in distil().modules() if hasattr(m, "fused_attn")]
    assert before == after == [m.fused_attn for m in dense.modules() if hasattr(m, "fused_attn")]


def test_the_rate_falls_as_the_width_grows_where_nobody_gives_one(pair, proxy_images, quick, monkeypatch):
    dense, small = pair
    seen, real = [], torch.optim.AdamW

    def optimizer(groups, **how):
        seen.append(groups[0]["peak"])
        return real(groups, **how)

    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    for options in ({}, {"lr": 0.25}):
        given = {key: value for key, value in quick.items() if key != "lr"}
        vitlr.refine(small, dense, proxy_images, rungs=["distil"], **{**given, "steps": 1, **options})
    assert seen == [0.01 / dense.embed_dim, 0.25]
