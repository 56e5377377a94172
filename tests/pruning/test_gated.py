"""The whole recipe of arXiv 2104.08500: what it trains, removes and fine-tunes, and how it goes on after a cut."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import torch

import vitlr
from vitlr.errors import InputError, NumericalError
from vitlr.measuring.cost import count_params
from vitlr.nn import LowRankLinear
from vitlr.pruning.gated import cut_off
from vitlr.pruning.gates import add_gates, gates

prune = functools.partial(vitlr.prune, tile=1)


class Stop(Exception):
    pass


def stop_after(updates: int, gated: bool):
    """A callback that breaks off a run in one of its phases."""

    def callback(step) -> None:
        if bool(gates(step.model)) == gated and step.updates == updates:
            raise Stop

    return callback


def same(a, b) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_it_prunes_to_the_rate_and_learns(tiny_vit, labelled, quick, tmp_path):
    model = tiny_vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = []
    small = prune(
        model,
        labelled,
        0.4,
        l1=0.01,
        recipe=quick,
        finetune=replace(quick, epochs=6),
        callbacks=[lambda step: seen.append((bool(gates(step.model)), step.updates))],
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert seen == [(True, k + 1) for k in range(8)] + [(False, k + 1) for k in range(24)]
    report = small.vitlr_pruning
    assert report.cut.rate == pytest.approx(0.4, abs=1 / 448) and not report.notes and not gates(small)
    assert count_params(small) == report.cut.params_kept < 0.8 * count_params(model)
    assert all(epoch.penalty > 0 for epoch in report.gates.epochs)
    assert all(epoch.penalty is None for epoch in report.finetuning.epochs)
    losses = [epoch.loss for epoch in report.finetuning.epochs]
    assert losses[-1] < 0.7 * losses[0]
    vitlr.save(small, tmp_path / "small.safetensors", recipe={"pruning": report.to_dict()})
    loaded = vitlr.load(tmp_path / "small.safetensors")
    assert same(loaded, small)
    assert loaded.vitlr_info["recipe"]["pruning"]["cut"]["params_kept"] == count_params(small)
    assert "feed-forward" in str(report) and "fine-tuning: trained on" in str(report)


def test_the_l1_term_drives_gates_down(tiny_vit, labelled, quick):
    sums = []
    for l1 in (0.0, 0.1):
        pruned = prune(tiny_vit(), labelled, 0.3, l1=l1, recipe=quick, finetune=False)
        sums.append(sum(pruned.vitlr_pruning.cut.at.values()))
        assert pruned.vitlr_pruning.finetuning is None
    assert sums[1] < sums[0]


@pytest.mark.parametrize("gated", [True, False])
def test_an_interrupted_run_goes_on_to_the_same_bits(gated, tiny_vit, labelled, quick, tmp_path):
    model = tiny_vit(proj_drop_rate=0.1)  # dropout draws random numbers
    recipe = replace(quick, recovery_interval=1, model_ema=True, model_ema_decay=0.9, model_ema_warmup=False)
    how = {"rate": 0.3, "l1": 0.01, "recipe": recipe, "finetune": replace(recipe, grad_accum_steps=2)}
    whole = prune(model, labelled, **how)
    with pytest.raises(Stop):
        prune(model, labelled, **how, resume=tmp_path / "run", callbacks=[stop_after(3, gated)])
    done = []
    resumed = prune(model, labelled, **how, resume=tmp_path / "run", callbacks=[lambda s: done.append(s.updates)])
    assert same(whole, resumed) and len(done) == (6 + 4 if gated else 2)
    again = prune(model, labelled, **how, resume=tmp_path / "run", callbacks=[stop_after(1, gated)])
    assert same(whole, again)  # nothing is left to do


def test_one_training_of_gates_serves_many_cuts(tiny_vit, labelled, quick, tmp_path):
    model, updates = tiny_vit(), []
    for rate in (0.2, 0.4):
        for thresholds in ("global", "type"):
            prune(
                model,
                labelled,
                rate,
                thresholds=thresholds,
                recipe=quick,
                resume=tmp_path,
                callbacks=[lambda step: updates.append(bool(gates(step.model)))],
            )
    assert sum(updates) == 8 and len(updates) == 8 + 4 * 8


def test_a_folder_of_another_run_is_refused(tiny_vit, labelled, quick, tmp_path):
    prune(tiny_vit(), labelled, 0.2, recipe=quick, finetune=False, resume=tmp_path)
    for change, said in (
        ({"l1": 0.5}, "its l1 was 0.0001, now it is 0.5"),
        ({"kinds": "fc2"}, "its gates was"),
        ({"recipe": replace(quick, lr=0.02)}, "its recipe lr was 0.01, now it is 0.02"),
    ):
        with pytest.raises(InputError, match=said):
            prune(tiny_vit(), labelled, 0.2, **{"recipe": quick, **change}, finetune=False, resume=tmp_path)
    with pytest.raises(InputError, match="its model was"):
        prune(tiny_vit(seed=3), labelled, 0.2, recipe=quick, finetune=False, resume=tmp_path)


def test_a_loss_that_is_no_number_stops_and_says_so(tiny_vit, labelled, quick):
    def broken_from(update: int, gated: bool):
        calls = []

        def loss(logits, targets):
            calls.append(1)
            value = torch.nn.functional.cross_entropy(logits, targets)
            return value * float("nan") if len(calls) > update + (0 if gated else 8) else value

        return loss

    with pytest.raises(NumericalError, match="the gates are untrained: the loss was nan at update 3"):
        prune(tiny_vit(), labelled, 0.3, recipe=quick, loss=broken_from(2, True))
    small = prune(tiny_vit(), labelled, 0.3, recipe=quick, loss=broken_from(6, True), finetune=False)
    assert small.vitlr_pruning.gates.kept == 1
    assert small.vitlr_pruning.notes == ("gates: the loss was nan at update 7: stopped, kept the best before it",)
    small = prune(tiny_vit(), labelled, 0.3, recipe=quick, loss=broken_from(5, False))
    assert small.vitlr_pruning.finetuning.kept == 1 and small.vitlr_pruning.notes[0].startswith("fine-tuning: the loss")
    assert all(torch.isfinite(p).all() for p in small.parameters())


def test_validation_chooses_among_epochs_of_the_fine_tuning_only(tiny_vit, labelled, quick):
    judged = []

    def validate(model) -> float:
        judged.append(bool(gates(model)))
        return -len(judged)

    small = prune(tiny_vit(), labelled, 0.3, recipe=quick, validate=validate)
    assert judged == [False, False] and small.vitlr_pruning.finetuning.kept == 1
    assert small.vitlr_pruning.gates.kept == 2


def test_it_distils_from_the_dense_model(tiny_vit, labelled, quick):
    model = tiny_vit()
    recipe = replace(quick, distill_loss_weight=1.0, lr=1e-3, epochs=4)
    shuffled = [(images, labels.flip(0)) for images, labels in labelled]
    first, second = (prune(model, batches, 0.2, recipe=recipe, reference=model) for batches in (labelled, shuffled))
    assert same(first, second)  # with all the weight on the dense model, labels do not matter
    assert same(first, prune(model, labelled, 0.2, recipe=recipe, reference=model, inplace=True))
    distances = [epoch.distillation for epoch in first.vitlr_pruning.finetuning.epochs]
    assert distances[-1] < distances[0]


def test_options_reach_the_cut(tiny_vit, labelled, quick):
    small = prune(
        tiny_vit(),
        labelled,
        budget="params:70%",
        thresholds="params",
        tile=4,
        kinds="fc1 fc2",
        recipe=quick,
        finetune=False,
    )
    cut = small.vitlr_pruning.cut
    assert cut.thresholds == "params" and {row.kind for row in cut.rows} == {"fc1", "fc2"}
    assert all(len(kept) % 4 == 0 for kept in cut.keep.values()) and cut.params_kept <= 0.7 * cut.params
    json.dumps(small.vitlr_pruning.to_dict())


def test_low_rank_and_fused_models_are_pruned_too(tiny_vit, labelled, quick, images):
    model = tiny_vit()
    for block in model.blocks:
        block.mlp.fc1 = LowRankLinear.from_linear(block.mlp.fc1, 5)
    small = prune(vitlr.fuse(model), labelled, 0.3, recipe=quick, finetune=False)
    assert small(images).shape == (6, 5) and count_params(small) < count_params(model)


def test_gates_that_become_one_or_stay(tiny_vit, images):
    from vitlr.pruning.thresholds import choose

    gated = add_gates(tiny_vit())
    for gate in gates(gated).values():
        gate.a.data = torch.rand_like(gate.a) + 0.5
    cut = choose(gated, 0.3)
    twin = add_gates(tiny_vit())
    twin.load_state_dict(gated.state_dict())
    with torch.no_grad():
        folded, published = cut_off(gated, cut), cut_off(twin, cut, fold=False)
        assert not torch.allclose(folded(images), published(images), atol=1e-2)
        for name, kept in cut.keep.items():
            if name.endswith("fc2"):
                assert torch.equal(published.get_submodule(name).weight, tiny_vit().get_submodule(name).weight[:, kept])


def test_progress_runs_through_both_phases(tiny_vit, labelled, quick):
    seen = []
    prune(tiny_vit(), labelled, 0.3, recipe=quick, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k + 1, 16) for k in range(16)]


def test_bad_wishes_are_refused_before_anything_is_read(tiny_vit, quick):
    def unread():
        raise AssertionError("too late")
        yield

    model = tiny_vit()
    for change, said in (
        ({"rate": 1.0}, "between 0 and 1"),
        ({"rate": None}, "either a rate"),
        ({"budget": "params:50%"}, "either a rate"),
        ({"thresholds": "best"}, "unknown thresholds 'best'"),
        ({"l1": -1}, "l1=-1"),
        ({"l1": float("nan")}, "l1=nan"),
        ({"kinds": "mlp"}, "unknown gates 'mlp'"),
        ({"tile": 0}, "tile=0"),
    ):
        with pytest.raises(InputError, match=said):
            prune(model, unread(), **{"rate": 0.4, **change}, recipe=quick)
    with pytest.raises(InputError, match="without a length"):
        prune(model, unread(), 0.4, recipe=quick)
    with pytest.raises(InputError, match="has no attention block to prune"):
        prune(torch.nn.Sequential(torch.nn.Linear(4, 4)), unread(), 0.4, recipe=quick)


@pytest.mark.parametrize("wish", [{"rate": 0.99}, {"rate": 0.3, "tile": 128}, {"budget": "params:5%"}])
def test_what_is_out_of_reach_is_refused_before_anything_is_trained(tiny_vit, quick, wish):
    class Unread(list):
        def __len__(self):
            return 1

        def __iter__(self):
            raise AssertionError("too late")

    with pytest.raises(InputError, match="cannot be reached"):
        prune(tiny_vit(), Unread(), **wish, recipe=quick)


def test_frozen_weights_are_only_ever_cut(tiny_vit, labelled, quick):
    model = tiny_vit()
    model.blocks[0].requires_grad_(False)
    small = prune(model, labelled, 0.3, kinds="fc2", fold=False, recipe=quick)
    kept = small.vitlr_pruning.cut.keep["blocks.0.mlp.fc2"]
    for name, p in small.blocks[0].named_parameters():
        before = model.blocks[0].get_parameter(name)
        if name.startswith("mlp.fc1"):
            before = before[kept]
        elif name == "mlp.fc2.weight":
            before = before[:, kept]
        assert torch.equal(p, before) and not p.requires_grad, name
    assert not torch.equal(small.norm.weight, model.norm.weight)
    with pytest.raises(InputError, match="every parameter of the model is frozen"):
        prune(tiny_vit().requires_grad_(False), labelled, 0.3, kinds="fc2", recipe=quick)


def test_widths_are_multiples_of_sixteen_unless_asked(tiny_vit, labelled, quick):
    cut = vitlr.prune(tiny_vit(), labelled, 0.3, recipe=quick, finetune=False).vitlr_pruning.cut
    assert all(len(kept) % 16 == 0 for kept in cut.keep.values()) and cut.rate >= 0.3
