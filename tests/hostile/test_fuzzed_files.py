"""Whatever is in a file: our own error, at once, in little memory; and no flipped bit goes unseen."""

import json
import random

import pytest
import torch
from mutations import Tally, changed, changed_tensors, damaged, packed, read

import vitlr
from vitlr.calibration.loop import calibrate
from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint import files
from vitlr.planning.plans import Plan
from vitlr.refinement.ladder import refine
from vitlr.runtime.storage import _written, digest

STEPS = {"rank_step": 4}


@pytest.fixture(scope="module")
def stages(tiny_vit):
    """A tiny model through all stages: dense, its statistics, a plan, and what came of it."""
    torch.manual_seed(0)
    model = tiny_vit(depth=1, embed_dim=16)
    images = torch.randn(12, 3, 32, 32)
    stats = calibrate(model, [images], objective="fisher")
    plan = vitlr.plan(model, stats, "params:80%", method="joint", **STEPS)
    return model, images, stats, plan, vitlr.apply(model, plan)


@pytest.fixture
def use(stages):
    """A function that uses a loaded model as a program would: it has to run."""
    _, images, *_ = stages

    def run(model):
        with torch.no_grad():
            model.float()(images[:1])
        str(model.vitlr_info)

    return run


def signed(header, tensors):
    """A file with a digest that fits, as somebody who means harm would write it."""
    body = {key: value for key, value in header.items() if key != "sha256"}
    return packed({**body, "sha256": digest(tensors, _written(body))}, tensors)


def test_model_files(stages, tmp_path, use):
    small, path, tally, rng = stages[-1], tmp_path / "m.safetensors", Tally(), random.Random(1)
    files.save(small, path, plan=stages[3])
    content = path.read_bytes()
    header, tensors = read(path)
    del header["digest"]
    for i in range(700):
        kind = i % 7
        if kind == 0:
            path.write_bytes(damaged(content, rng))
            assert not tally(f"{i} damaged", lambda: files.load(path)) or path.read_bytes() == content
            continue
        body = changed(header, rng) if kind < 5 else header
        held = changed_tensors(tensors, rng) if kind > 3 else tensors
        try:
            told = {**body, "digest": files._digest(held, body)}
            path.write_bytes(packed(told, held))
        except (TypeError, ValueError, AttributeError):
            continue
        tally(f"{i} {kind}", lambda: use(files.load(path)))
    tally.check()
    assert tally.refused > 400


def lies(count, path, rng, tally, load, use):
    """So many files in the place of a good one: damaged for `load`, or changed with a digest that fits for `use`."""
    content = path.read_bytes()
    header, tensors = read(path)
    for i in range(count):
        kind = i % 6
        if kind == 0:
            path.write_bytes(damaged(content, rng))
            assert not tally(f"{i} damaged", load) or path.read_bytes() == content
            continue
        body = changed(header, rng) if kind < 4 else header
        held = changed_tensors(tensors, rng) if kind > 3 else tensors
        path.write_bytes(signed(body, held))
        tally(f"{i} {kind}", use)
    tally.check()


def test_statistics(stages, tmp_path):
    model, _, stats, *_ = stages
    path, tally = tmp_path / "s.safetensors", Tally()
    stats.save(path)

    def plan():
        found = Statistics.load(path)
        str(vitlr.plan(model, found, "params:80%", **STEPS)), str(found)

    lies(600, path, random.Random(2), tally, lambda: Statistics.load(path), plan)
    assert tally.refused > 300


def test_spectra(stages, tmp_path):
    model, _, stats, *_ = stages
    beside, path, tally = tmp_path / "s.safetensors", tmp_path / "s.spectra.safetensors", Tally()
    stats.save(beside)
    vitlr.plan(model, stats, "params:80%", method="joint", beside=beside, **STEPS)

    def plan():
        str(vitlr.plan(model, stats, "params:80%", method="joint", beside=beside, **STEPS))

    lies(300, path, random.Random(5), tally, plan, plan)
    assert tally.refused > 150


def test_plans(stages, tmp_path):
    model, _, stats, plan, _ = stages
    path, tally, rng = tmp_path / "p.json", Tally(), random.Random(3)
    plan.save(path)
    content, body = path.read_bytes(), json.loads(plan.to_json())

    def apply():
        found = Plan.load(path)
        str(found), found.to_json(), found.changes
        if rng.random() < 0.1:
            vitlr.apply(model, found, stats)

    for i in range(1500):
        path.write_bytes(damaged(content, rng) if i % 5 == 0 else json.dumps(changed(body, rng)).encode())
        tally(str(i), apply)
    tally.check()
    assert tally.refused > 1000


def test_snapshots(stages, tmp_path):
    model, *_, small = stages
    folder, tally, rng = tmp_path / "snapshots", Tally(), random.Random(4)
    loader = [torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))]
    how = {"rungs": ("distil",), "steps": 4, "every": 2, "mixup": False, "batch_size": 8}

    class Stop(Exception):
        pass

    def stop(done, total):
        if done >= 3:
            raise Stop

    with pytest.raises(Stop):
        refine(small, model, loader, resume=folder, progress=stop, **how)
    path = folder / "distil.safetensors"
    content = path.read_bytes()
    header, tensors = read(path)
    for i in range(150):
        kind = i % 6
        if kind == 0:
            path.write_bytes(damaged(content, rng))
        else:
            body = {**header, "state": changed(header["state"], rng)} if kind < 4 else header
            held = changed_tensors(tensors, rng) if kind > 3 else tensors
            path.write_bytes(signed(body, held))
        tally(f"{i} {kind}", lambda: refine(small, model, loader, resume=folder, **how))
        (folder / "after_distil.safetensors").unlink(missing_ok=True)
    tally.check()
    assert tally.refused > 75
