"""compress under a budget of milliseconds: tried, corrected, carried out, fused, measured, and told."""

from __future__ import annotations

import pytest
import torch
from fake_clock import FakeClock

import vitlr
from vitlr.compression import compressed
from vitlr.errors import InputError
from vitlr.measuring import clock
from vitlr.nn import FusedAttention, Int8Block, Int8Linear, Int8MLP, LowRankLinear, SelectedLinear
from vitlr.planning import planner
from vitlr.planning.budgets import OutOfReach
from vitlr.planning.plans import Plan
from vitlr.surgery.promises import multiply_planned

STEPS = {"rank_step": 4, "width_step": 16}
TOKENS = 17


@pytest.fixture
def ticking(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def start(**how):
        monkeypatch.setattr(clock, "race", FakeClock(TOKENS, **how))

    start()
    return start


@pytest.fixture(scope="module")
def vit(tiny_vit):
    return tiny_vit(embed_dim=48, num_heads=3).eval()


@pytest.fixture(scope="module")
def loader():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 3, 32, 32, generator=generator) for _ in range(3)]


def ms(model):
    return FakeClock(TOKENS).ms(model, torch.zeros(8, 3, 32, 32))


@torch.no_grad()
@pytest.mark.parametrize("share", [60, 22])
def test_the_model_comes_back_fused_in_the_time_that_was_promised(vit, loader, ticking, share, tmp_path):
    done = compressed(vit, loader, f"latency:{share}%", batch_size=8, **STEPS)
    small, latency = done.model, done.plan.latency
    assert isinstance(small.blocks[0].attn, FusedAttention)
    assert any(isinstance(module, Int8MLP) for module in small.modules())
    assert ms(small) <= share / 100 * ms(vit) * 1.001
    assert latency.measured_ms == pytest.approx(ms(small), rel=1e-3) and latency.kept and abs(latency.off) < 0.01
    assert latency.correction == 1.0 and "as promised" in str(done.plan)
    assert small.vitlr_info["plan"]["latency"] == latency.to_dict() == done.plan.to_dict()["latency"]
    made = [name for name, module in small.named_modules() if type(module) is Int8Linear]
    assert {name.removesuffix(".down").removesuffix(".up") for name in made} == set(done.plan.bytes_layers)
    y, x = vit(loader[0]), loader[0]
    if share == 60:
        assert (small(x) - y).norm() < 0.2 * (y - y.mean(0)).norm()
    vitlr.save(small, tmp_path / "small.safetensors")
    again = vitlr.load(tmp_path / "small.safetensors")
    assert torch.equal(again(x), small(x))
    assert Plan.from_dict(again.vitlr_info["plan"]).latency == latency


def test_what_takes_longer_within_the_model_is_corrected_once(vit, loader, ticking):
    ticking(drag=1.3)
    done = compressed(vit, loader, "latency:60%", batch_size=8, method="lowrank", extras=("input_abs",), **STEPS)
    latency = done.plan.latency
    assert latency.correction == pytest.approx(1.3, rel=0.02)
    assert done.plan.ranks and latency.kept and abs(latency.off) < 0.02
    assert latency.measured_ms <= 0.6 * latency.measured_dense_ms * 1.02


@torch.no_grad()
def test_queries_and_keys_get_shorter_where_blocks_multiply_bytes(vit, loader, ticking, tmp_path):
    done = compressed(vit, loader, "latency:19%", batch_size=8, **{**STEPS, "width_step": 4})
    narrow = {
        row.name: row.width for row in done.plan.widths if row.kind == "query_keys" and row.width < row.full_width
    }
    assert narrow and done.plan.latency.kept
    for name, width in narrow.items():
        qkv = done.model.get_submodule(f"{name}.qkv")
        assert isinstance(qkv, SelectedLinear) and isinstance(qkv.linear, Int8Linear)
        assert qkv.linear.out_features == 48 + 2 * width and f"{name}.qkv" in done.plan.bytes_layers
    assert all(isinstance(block, Int8Block) for block in done.model.blocks)
    vitlr.save(done.model, tmp_path / "small.safetensors")
    again = vitlr.load(tmp_path / "small.safetensors")
    assert torch.equal(again(loader[0]), done.model(loader[0]))
    assert Plan.from_dict(again.vitlr_info["plan"]).widths == done.plan.widths


def test_of_floats_queries_and_keys_stay_as_they_are(vit, loader, ticking):
    floats = vitlr.calibrate(vit, loader)
    done = compressed(vit, loader, "latency:60%", batch_size=8, measure=lambda _: floats, **STEPS)
    assert done.plan.changes and not any(row.kind == "query_keys" for row in done.plan.widths)
    asked = {"batch_size": 8, "measure": lambda _: floats, "attention": "query_keys", **STEPS}
    with pytest.raises(InputError, match="attention='query_keys' saves time where layers multiply bytes"):
        compressed(vit, loader, "latency:60%", **asked)


def test_what_the_table_holds_for_out_of_reach_is_tried_and_nothing_solved_again(vit, loader, ticking, monkeypatch):
    floats, solved, solve = vitlr.calibrate(vit, loader), [], planner.solve
    monkeypatch.setattr(planner, "solve", lambda *args, **how: (solved.append(how["known"]), solve(*args, **how))[1])
    how = {"batch_size": 8, "method": "lowrank", "measure": lambda _: floats, **STEPS}
    with pytest.raises(OutOfReach) as cause:
        compressed(vit, loader, "latency:1%", **how)
    far = f"latency:{0.7 * cause.value.least:.6f}ms"
    with pytest.raises(InputError, match="cannot be reached"):
        compressed(vit, loader, far, **how)
    ticking(drag=0.5)
    solved.clear()
    done = compressed(vit, loader, far, **how)
    assert done.plan.latency.kept and 0.4 < done.plan.latency.correction < 0.6
    assert len(solved) > 1 and solved[0] is None and all(known is not None for known in solved[1:])
    with pytest.raises(InputError, match="cannot be reached"):
        compressed(vit, loader, far, plan_only=True, **how)


def test_a_promise_that_no_correction_keeps_is_told_by_how_much(vit, loader, ticking):
    ticking(drag=8.0)
    floats = vitlr.calibrate(vit, loader)
    done = compressed(vit, loader, "latency:85%", batch_size=8, method="lowrank", measure=lambda _: floats, **STEPS)
    latency = done.plan.latency
    assert any(isinstance(module, LowRankLinear) for module in done.model.modules())
    assert not latency.kept and latency.off == pytest.approx(7, rel=0.02) and latency.correction == 1.0
    assert "slower, NOT as promised, within 10% was expected" in str(done.plan)


@torch.no_grad()
def test_refined_it_multiplies_bytes_afterwards(vit, loader, ticking):
    done = compressed(vit, loader, "latency:25%", batch_size=8, rungs="refit", **STEPS)
    assert done.report is not None and done.plan.bytes_layers
    assert ms(done.model) == pytest.approx(done.plan.latency.promised_ms, rel=0.01)
    assert any(isinstance(module, Int8Linear) for module in done.model.modules())


def test_in_place_the_dense_model_is_still_what_it_is_measured_against(tiny_vit, loader, ticking):
    model = tiny_vit(embed_dim=48, num_heads=3).eval()
    dense = ms(model)
    small = vitlr.compress(model, loader, "latency:50%", batch_size=8, inplace=True, **STEPS)
    assert small is model and small.vitlr_info["plan"]["latency"]["measured_dense_ms"] == pytest.approx(dense, rel=1e-3)


def test_only_a_plan_is_made_where_only_that_is_asked_for(vit, loader, ticking):
    done = compressed(vit, loader, "latency:50%", batch_size=8, plan_only=True, **STEPS)
    assert done.model is vit and done.plan.latency.measured_ms is None and "promised" in str(done.plan)


def test_the_batch_of_a_refinement_is_its_own(vit, loader, ticking):
    small = vitlr.compress(vit, loader, "params:80%", batch_size=8, rungs=["distil"], steps=2, every=1, amp=False)
    assert "plan" in small.vitlr_info


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": 2}, "rounds=2 counts what is counted, not times; it does not go with latency:50%"),
        ({"bits": 8}, "bits=8 counts stored bytes, and codes run no faster"),
        ({"threads": 5000}, "this process may use"),
        ({"batch_size": 0}, "batch_size=0, expected a whole number"),
    ],
)
def test_what_goes_nowhere_is_refused_before_any_image_is_read(vit, ticking, options, words):
    def unread():
        raise AssertionError("an image was read")
        yield

    class Images:
        __iter__ = staticmethod(unread)

    with pytest.raises(InputError, match=words) as error:
        vitlr.compress(vit, Images(), "latency:50%", **options)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_step_by_step_it_is_the_same(vit, loader, ticking):
    stats = vitlr.calibrate(vit, loader, extras=("ranges",))
    plan = vitlr.plan(vit, stats, "latency:25%", batch_size=8, **STEPS)
    floats = vitlr.apply(vit, plan)
    ranges = vitlr.calibrate(floats, loader, extras=("ranges",), hidden=False, include=plan.bytes_layers)
    assert plan.bytes_layers and plan.changes and not any(isinstance(m, Int8Linear) for m in floats.modules())
    multiply_planned(floats, ranges)
    assert ms(vitlr.fuse(floats)) == pytest.approx(plan.latency.promised_ms, rel=0.01)


def test_images_that_are_used_up_are_refused(vit, loader, ticking):
    with pytest.raises(InputError, match="calibration uses this loader up"):
        vitlr.compress(vit, iter(loader), "latency:50%")


@torch.no_grad()
def test_a_model_in_bfloat16_is_timed_and_comes_back_in_it(tiny_vit, loader, ticking):
    model = tiny_vit(embed_dim=48, num_heads=3).eval().bfloat16()
    done = compressed(model, loader, "latency:40%", batch_size=8, **STEPS)
    assert done.plan.latency.dtype == "bfloat16" and done.plan.latency.kept and done.plan.bytes_layers
    y = done.model(loader[0].bfloat16())
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()
