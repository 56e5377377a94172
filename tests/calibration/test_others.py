"""What rounding the matrices beside the linears costs: summed where linears are measured, and what was found of it."""

from __future__ import annotations

import pytest
import torch

import vitlr
from vitlr.calibration.statistics import SCHEMA, Statistics
from vitlr.errors import InputError
from vitlr.runtime import compact, storage

HOW = {"objective": "loss", "extras": ("rounding",), "hidden": False}


@pytest.fixture(scope="module")
def measured(tiny_vit):
    model = tiny_vit(embed_dim=96, num_heads=3, num_classes=80).eval()
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model, images, vitlr.calibrate(model, images.split(8), **HOW)


def test_each_number_is_a_sum_over_batches_and_rows_of_squares(tiny_vit):
    model = tiny_vit(embed_dim=96, num_heads=3, num_classes=80).eval()
    batches = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2)).split(3)
    stats = vitlr.calibrate(model, batches, loss_fn=lambda y, x: y.square().sum(), **HOW)
    assert set(stats.others) == {"head.weight", "patch_embed.proj.weight"}  # positions are too few
    for name in stats.others:
        W = dict(model.named_parameters())[name]
        expected = torch.zeros(len(compact.BITS), dtype=torch.float64)
        for x in batches:
            (g,) = torch.autograd.grad(model(x).square().sum(), W)
            for index, bits in enumerate(compact.BITS):
                E = (compact.rounded(W.detach(), bits) - W.detach()).flatten(1)
                expected[index] += (g.flatten(1) * E).sum(1).double().square().sum()
        torch.testing.assert_close(stats.others[name], expected, rtol=1e-3, atol=0)


def test_the_model_comes_back_as_it_was(tiny_vit):
    model = tiny_vit(embed_dim=96, num_heads=3, num_classes=80).eval()
    model.patch_embed.proj.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    vitlr.calibrate(model, [torch.randn(2, 3, 32, 32)], **HOW)
    assert not model.patch_embed.proj.weight.requires_grad and model.patch_embed.proj.weight.grad is None
    assert model.head.weight.requires_grad and bool((model.head.weight.grad == 1).all())


def test_files_keep_them_and_two_runs_add_up(measured, tmp_path):
    model, images, stats = measured
    stats.save(tmp_path / "s")
    again = Statistics.load(tmp_path / "s")
    one, other = (vitlr.calibrate(model, part.split(8), **HOW) for part in (images[:8], images[8:]))
    for name, lost in stats.others.items():
        assert torch.equal(again.others[name], lost)
        torch.testing.assert_close(one.merge(other).others[name], lost)


def test_what_no_calibration_gives_is_refused(measured, tmp_path):
    measured[2].save(tmp_path / "s")
    tensors, header = storage.load_tensors(tmp_path / "s", kind="statistics", schema=SCHEMA)
    for wrong in (torch.ones(2, dtype=torch.float64), torch.ones(5), -torch.ones(5, dtype=torch.float64)):
        storage.save_tensors(
            tmp_path / "t", {**tensors, "|head.weight": wrong}, header, kind="statistics", schema=SCHEMA
        )
        with pytest.raises(InputError, match=r"head\.weight is .* expected 5 sums of squares"):
            Statistics.load(tmp_path / "t")


def test_without_gradients_there_is_none(measured):
    model, images, _ = measured
    assert not vitlr.calibrate(model, [images], **{**HOW, "objective": "output"}).others
    assert not vitlr.calibrate(model, [images], objective="loss", hidden=False).others


def test_fewer_bits_are_taken_where_they_promise_enough_and_the_file_takes_what_the_plan_says(
    measured, tmp_path, monkeypatch
):
    model, images, stats = measured
    taken = {}
    for promise in (0.0, 0.99):
        monkeypatch.setattr("vitlr.planning.allocation.PROMISE", promise)
        plan = vitlr.plan(model, stats, "bytes:12%", method="bits")
        small = vitlr.apply(model, plan)
        taken[promise] = {row.name: row.bits for row in plan.others}
        for row in plan.others:
            W = dict(small.named_parameters())[row.name]
            assert torch.equal(W, compact.rounded(dict(model.named_parameters())[row.name].detach(), row.bits))
        vitlr.save(small, tmp_path / "m", plan=plan)
        assert plan.bytes_kept * 0.95 <= (tmp_path / "m").stat().st_size <= plan.bytes_kept + 2**16
        assert torch.equal(vitlr.load(tmp_path / "m")(images), small(images))
        assert vitlr.Plan.from_json(plan.to_json()) == plan
    assert set(taken[0.99].values()) == {7}
    assert min(taken[0.0].values()) < 7 and taken[0.0]["patch_embed.proj.weight"] >= 6


def test_bits_by_number_leave_them_at_seven(measured):
    model, _, stats = measured
    plan = vitlr.plan(model, stats, bits=4)
    assert not plan.others
    W = vitlr.apply(model, plan).head.weight
    assert torch.equal(W, compact.rounded(model.head.weight.detach()))


def test_bits_of_a_matrix_that_is_not_there_are_refused(measured):
    model, _, stats = measured
    body = vitlr.plan(model, stats, "bytes:12%", method="bits").to_dict()
    body["others"][0]["name"] = "nowhere"
    with pytest.raises(InputError, match="no parameter 'nowhere'"):
        vitlr.apply(model, vitlr.Plan.from_dict(body), stats)
    body["others"][0] |= {"name": "head.weight", "bits": 2}
    with pytest.raises(InputError, match="bits"):
        vitlr.Plan.from_dict(body)
