"""Spectra kept beside statistics: what is read is what was solved, and never what belongs to something else."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import vitlr
from vitlr.calibration.statistics import SCHEMA, Statistics
from vitlr.decomposition import ranked_widths, ranks, spectra_file
from vitlr.decomposition.spectra_file import place
from vitlr.errors import InputError, RunError
from vitlr.runtime import storage

HOW = {"method": "joint", "width_step": 16}


@pytest.fixture
def measured(tiny_vit, batches, tmp_path):
    model, path = tiny_vit(), tmp_path / "stats.safetensors"
    return model, vitlr.calibrate(model, batches, objective=("fisher", "loss"), hidden=True, resume=path), path


@pytest.fixture
def unsolvable(monkeypatch):
    """From now on whoever solves a layer or an MLP fails."""

    def fails():
        for module, name in ((ranks, "solve"), (ranked_widths, "Elimination")):
            monkeypatch.setattr(module, name, lambda *_: pytest.fail("solved again"))

    return fails


def rows(plan):
    return plan.layers, plan.widths


def test_a_second_budget_is_planned_from_the_file_and_gives_the_same_model(measured, unsolvable):
    model, stats, path = measured
    expected = vitlr.apply(model, vitlr.plan(model, stats, "params:60%", **HOW)).state_dict()
    assert not place(path).exists()
    first = vitlr.plan(model, stats, "params:80%", beside=path, **HOW)
    assert rows(first) == rows(vitlr.plan(model, stats, "params:80%", **HOW))
    written = place(path).read_bytes()
    unsolvable()
    again = vitlr.plan(model, Statistics.load(path), "params:60%", beside=path, **HOW)
    found = vitlr.apply(model, again).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert place(path).read_bytes() == written


@pytest.mark.parametrize("objective", ["loss", "output"])
def test_centred_ranks_come_back_with_their_mean(tiny_vit, batches, tmp_path, unsolvable, objective):
    model, path = tiny_vit(), tmp_path / "stats.safetensors"
    stats = vitlr.calibrate(model, batches, objective=objective, resume=path)
    first = vitlr.plan(model, stats, "params:80%", method="lowrank", centred=True, beside=path)
    unsolvable()
    again = vitlr.plan(model, stats, "params:80%", method="lowrank", centred=True, beside=path)
    for name, layer in first.spectra.layers.items():
        assert torch.equal(layer.mean, again.spectra.layers[name].mean)
    assert rows(first) == rows(again)


def test_channels_of_values_are_kept_as_neurons_are(tiny_vit, batches, tmp_path, unsolvable):
    model, path = tiny_vit(), tmp_path / "stats.safetensors"
    stats = vitlr.calibrate(model, batches, hidden="attention", resume=path)
    first = vitlr.plan(model, stats, "params:70%", attention="channels", beside=path, **HOW)
    unsolvable()
    assert rows(vitlr.plan(model, stats, "params:70%", attention="channels", beside=path, **HOW)) == rows(first)


@pytest.mark.parametrize(
    "changes",
    [{"objective": "loss"}, {"damping": 0.3}, {"ridge": 0.1}, {"compensate": False}, {"width_step": 8}],
    ids=str,
)
def test_what_was_solved_in_another_way_is_solved_anew(measured, changes):
    model, stats, path = measured
    vitlr.plan(model, stats, "params:70%", beside=path, **HOW)
    before = place(path).read_bytes()
    how = {**HOW, **changes}
    found = vitlr.plan(model, stats, "params:70%", beside=path, **how)
    assert rows(found) == rows(vitlr.plan(model, stats, "params:70%", **how))
    assert place(path).read_bytes() != before


def test_spectra_of_other_statistics_are_replaced(measured, batches):
    model, stats, path = measured
    vitlr.plan(model, stats, "params:70%", beside=path, **HOW)
    path.unlink()
    other = vitlr.calibrate(model, batches[:1], hidden=True, resume=path)
    found = vitlr.plan(model, other, "params:70%", beside=path, **HOW)
    assert rows(found) == rows(vitlr.plan(model, other, "params:70%", **HOW))
    header = storage.load_header(place(path), kind="spectra", schema=1)
    assert header["statistics"] == storage.digest_told(path, kind="statistics", schema=SCHEMA)


def test_widths_are_added_to_what_ranks_left(measured, unsolvable):
    model, stats, path = measured
    vitlr.plan(model, stats, "params:80%", method="lowrank", beside=path)
    small = place(path).stat().st_size
    first = vitlr.plan(model, stats, "params:70%", beside=path, **HOW)
    assert place(path).stat().st_size > small
    unsolvable()
    assert rows(vitlr.plan(model, stats, "params:70%", beside=path, **HOW)) == rows(first)
    vitlr.plan(model, stats, "params:80%", method="lowrank", beside=path)
    assert place(path).stat().st_size > small, "ranks alone have thrown the widths away"


def test_a_damaged_or_foreign_file_is_refused_and_left_alone(measured):
    model, stats, path = measured
    vitlr.plan(model, stats, "params:70%", beside=path, **HOW)
    whole = bytearray(place(path).read_bytes())
    whole[-9] ^= 1
    for content, message in ((bytes(whole), "digest does not match"), (path.read_bytes(), "expected a spectra")):
        place(path).write_bytes(content)
        with pytest.raises(InputError, match=rf"{message}.*remove .*spectra\.safetensors, and it is made anew"):
            vitlr.plan(model, stats, "params:70%", beside=path, **HOW)
        assert place(path).read_bytes() == content


@pytest.mark.parametrize(
    ("key", "lie", "message"),
    [
        ("blocks.0.mlp|mlp|order", lambda t: t.clamp_min(1), "its order is none of 128 neurons"),
        ("blocks.0.mlp|mlp|order", lambda t: t.double(), r"order is torch.float64 \[128\]"),
        ("blocks.0.mlp|mlp|errors", lambda t: t[:-1].clone(), r"errors is torch.float64 \[128\]"),
        ("blocks.0.mlp|mlp|errors", lambda t: t * float("nan"), "finite numbers"),
        ("blocks.0.mlp|mlp|errors", lambda t: -t, "losses below 0"),
        ("blocks.0.mlp|mlp|second", lambda t: t[1:].clone(), r"ranked is torch.int64 \[7\], expected .* \[6\]"),
        ("blocks.0.mlp|mlp|second", lambda t: t[:, 1:].clone(), r"second is torch.float64 \[7, 32\]"),
        ("blocks.0.mlp|mlp|ranked", lambda t: t + 1000, "widths outside 1 to 127"),
        ("blocks.0.mlp|mlp|ranked", lambda t: t.double(), "ranked is torch.float64"),
        ("blocks.0.mlp.fc1|P", lambda t: t[1:].clone(), r"P is torch.float64 \[31, 32\]"),
        ("blocks.0.mlp.fc1|energies", lambda t: t.float(), "energies is torch.float32"),
    ],
)
def test_a_file_that_lies_is_refused(measured, key, lie, message):
    model, stats, path = measured
    vitlr.plan(model, stats, "params:70%", beside=path, **HOW)
    tensors, header = storage.load_tensors(place(path), kind="spectra", schema=1)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors[key] = lie(tensors[key])
    header = {name: value for name, value in header.items() if name not in ("kind", "schema")}
    storage.save_tensors(place(path), tensors, header, kind="spectra", schema=1)
    with pytest.raises(InputError, match=message):
        vitlr.plan(model, stats, "params:70%", beside=path, **HOW)


def test_where_nothing_can_be_written_the_plan_stands(measured, monkeypatch, caplog):
    model, stats, path = measured

    def full(*args, **kwargs):
        raise RunError("could not write: no space left")

    monkeypatch.setattr(spectra_file.storage, "save_tensors", full)
    assert vitlr.plan(model, stats, "params:70%", beside=path, **HOW).widths
    assert "not kept for a next budget: could not write" in caplog.text


def test_statistics_of_an_earlier_vitlr_keep_none(measured):
    model, stats, path = measured
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    metadata["vitlr"] = metadata["vitlr"].replace('"sha256"', '"nothing"')
    save_file(tensors, path, metadata)
    assert vitlr.plan(model, stats, "params:70%", beside=path, **HOW).widths
    assert not place(path).exists()
