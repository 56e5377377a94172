"""Files are whole or not there, and strangers are told apart."""

import json
import struct

import pytest
import torch

from vitlr.errors import InputError, RunError
from vitlr.runtime.places import atomic_path, check_writable
from vitlr.runtime.storage import load_header, load_tensors, save_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def test_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {"note": "é"}, kind="model", schema=2)
    tensors, header = load_tensors(path, kind="model", schema=3)
    assert header == {"kind": "model", "schema": 2, "note": "é"} == load_header(path, kind="model", schema=2)
    assert all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(RunError, match="space"), atomic_path(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_unwritable_places_are_refused_before_any_work(tmp_path):
    for bad in (tmp_path, tmp_path / "no" / "such" / "folder.x"):
        with pytest.raises(InputError, match="cannot write"):
            check_writable(bad)
    assert check_writable(tmp_path / "fine") == tmp_path / "fine"
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept").write_text("mine")
    (tmp_path / "kept").chmod(0o444)
    with pytest.raises(InputError, match="read-only"):
        check_writable(tmp_path / "kept")


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {}, kind="model", schema=1)
    return path


def test_damaged_and_foreign_files_are_refused(saved, tmp_path):
    whole = saved.read_bytes()
    foreign = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    damaged = {
        "truncated": whole[:-3],
        "cut header": whole[:20],
        "empty": b"",
        "text": b"hello world, this is no tensor file",
        "pickle": b"\x80\x04\x95" + bytes(64),
        "bomb": struct.pack("<Q", 2**62) + b"{}",
        "foreign": struct.pack("<Q", len(foreign)) + foreign + bytes(4),
    }
    for name, content in damaged.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError):
            load_tensors(path, kind="model", schema=1)
    with pytest.raises(InputError, match="no such file"):
        load_tensors(tmp_path / "missing", kind="model", schema=1)


def test_other_kinds_and_newer_schemas_are_refused(saved):
    with pytest.raises(InputError, match="holds a vitlr model, expected a statistics"):
        load_header(saved, kind="statistics", schema=1)
    with pytest.raises(InputError, match="upgrade"):
        load_header(saved, kind="model", schema=0)
