"""Sums in a temporary file are the same numbers, and no memory of the process while nobody looks at them."""

import gc
import sys
from pathlib import Path

import pytest
import torch

import vitlr
from vitlr.errors import InputError
from vitlr.runtime.mapped import Mapped, put_away

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident():
    """Bytes of files in this process's memory: what else it allocates meanwhile does not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssShmem")))


@linux
def test_what_is_put_away_is_not_resident_and_comes_back(tmp_path):
    file = Mapped(str(tmp_path))
    one, two = file.zeros(4_000_001), file.zeros(5)
    before = resident()
    one += torch.arange(4_000_001)
    two += 1
    assert resident() - before > 30e6
    put_away(one)
    assert resident() - before < 10e6
    assert torch.equal(one, torch.arange(4_000_001, dtype=torch.float64)) and two.tolist() == [1] * 5
    put_away(torch.ones(3))  # of no file


def test_tensors_outlive_their_file_and_leave_nothing_behind(tmp_path):
    kept = Mapped(str(tmp_path)).zeros(1000)
    gc.collect()
    kept += 2
    put_away(kept)
    assert kept.sum() == 2000 and not [*tmp_path.iterdir()]


def test_a_folder_that_is_none_and_a_full_disk_are_said(tmp_path):
    with pytest.raises(InputError, match=r"cannot write into '.*nowhere': .*; name a folder on a disk"):
        Mapped(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"has no room for 8,000,000,000,000,000 bytes after 0 \(.*another disk"):
        Mapped(str(tmp_path)).zeros(10**15)


def assert_same(stats, expected):
    for name, layer in expected.layers.items():
        assert dict(layer.own()).keys() == dict(stats.layers[name].own()).keys()
        for key, tensor in layer.own():
            assert torch.equal(tensor, stats.layers[name].packed(key)), (name, key)


def test_calibration_in_a_file_gives_the_same_bits_and_goes_on_from_them(tiny_vit, batches, tmp_path):
    model, how = tiny_vit(), {"objective": "fisher", "hidden": "attention", "sums_in": str(tmp_path)}
    expected = vitlr.calibrate(model, batches, **{**how, "sums_in": None})
    found = vitlr.calibrate(model, batches, **how)
    assert_same(found, expected)
    part = vitlr.calibrate(model, batches[:2], **{**how, "sums_in": None})
    assert_same(vitlr.calibrate(model, batches[2:], stats=part, **how), expected)
    found.save(tmp_path / "stats.safetensors")
    assert_same(vitlr.Statistics.load(tmp_path / "stats.safetensors"), expected)
    plans = [vitlr.plan(model, stats, "params:60%") for stats in (found, expected)]
    assert plans[0].layers == plans[1].layers


def test_a_model_elsewhere_is_refused(tiny_vit, batches, tmp_path, monkeypatch):
    monkeypatch.setattr("vitlr.calibration.loop.triangles", lambda device: False)
    with pytest.raises(InputError, match=r"sums_in=.* is for a model on the CPU"):
        vitlr.calibrate(tiny_vit(), batches, sums_in=str(tmp_path))
