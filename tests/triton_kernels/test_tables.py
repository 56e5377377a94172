"""Tile tables: the nearest row, measured rows first, and autotuning that survives what does not run."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from vitlr.triton_kernels import tables
from vitlr.triton_kernels.targets import INTERPRETER, TARGETS

SM90, SM80 = TARGETS["sm_90"], TARGETS["sm_80"]
ROWS = [
    {"target": "sm_90", "bits": 16, "r": 64, "M": 197, "config": {"BM": 16}},
    {"target": "sm_90", "bits": 16, "r": 64, "M": 12608, "config": {"BM": 128}},
    {"target": "sm_90", "bits": 16, "r": 256, "config": {"BM": 64}},
    {"target": "sm_80", "bits": 16, "r": 64, "M": 12608, "config": {"BM": 32}},
]


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    """A shipped table for the kernel `toy`, and an empty cache."""
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "toy.json").write_text(json.dumps(ROWS))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for function in (tables.shipped, tables.measured):
        function.cache_clear()
    yield
    for function in (tables.shipped, tables.measured):
        function.cache_clear()


def nearest(target=SM90, dtype=torch.bfloat16, **sizes):
    return tables.nearest("toy", target, dtype, **sizes)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"r": 64, "M": 12608}, {"BM": 128}),
        ({"r": 64, "M": 50432}, {"BM": 128}),
        ({"r": 80, "M": 100}, {"BM": 16}),
        ({"r": 200, "M": 1}, {"BM": 64}),  # that row holds for any M
    ],
)
def test_the_nearest_row_in_octaves(sizes, expected):
    assert nearest(**sizes) == expected


def test_rows_of_other_targets_and_widths_do_not_count():
    assert nearest(SM80, r=64, M=12608) == {"BM": 32}
    assert nearest(dtype=torch.float32, r=64, M=12608) is None
    assert nearest(TARGETS["sm_100"], r=64, M=12608) is None
    assert nearest(INTERPRETER, r=64, M=12608) == {"BM": 128}
    assert tables.nearest("unheard of", SM90, torch.bfloat16, r=64) is None


def test_tuning_keeps_the_fastest_that_runs_and_is_asked_first():
    ran = []

    def run(config):
        ran.append(config["BM"])
        if config["BM"] == 256:
            raise torch.cuda.OutOfMemoryError("no room")

    times = iter([3.0, 1.0, 2.0])

    def clock(function):
        function()
        return next(times)

    sizes = {"r": 64, "M": 12608}
    configs = [{"BM": 256}, {"BM": 32}, {"BM": 64}, {"BM": 96}]
    best = tables.tune("toy", SM90, torch.bfloat16, sizes, configs, run, "a card", clock)
    assert ran == [256, 32, 64, 96] and best == {"BM": 64}
    assert nearest(**sizes) == {"BM": 64}
    assert nearest(r=64, M=12609) == {"BM": 128}  # measured rows are of exactly their sizes
    (row,) = json.loads(tables.cache_file("toy").read_text())
    assert row == {"target": "sm_90", "bits": 16, **sizes, "config": {"BM": 64}, "from": "a card"}

    tables.tune("toy", SM90, torch.bfloat16, sizes, [{"BM": 1}], lambda config: None, "a card", lambda function: 1.0)
    tables.tune("toy", SM90, torch.float32, sizes, [{"BM": 2}], lambda config: None, "a card", lambda function: 1.0)
    assert nearest(**sizes) == {"BM": 1} and nearest(dtype=torch.float32, **sizes) == {"BM": 2}


def test_nothing_that_runs_is_an_error_that_says_why():
    def run(config):
        raise torch.cuda.OutOfMemoryError("no room")

    with pytest.raises(RuntimeError, match=r"toy: none of 1 configs runs for \{'r': 64\}.*no room"):
        tables.tune("toy", SM90, torch.bfloat16, {"r": 64}, [{"BM": 1}], run, "a card", lambda function: function())
    assert not tables.cache_file("toy").exists()


@dataclass(frozen=True)
class Config:
    BM: int


def test_measuring_is_asked_for_and_happens_once(monkeypatch):
    ran = []

    def measure(options, **sizes):
        return tables.measure("toy", lambda: options, sizes, torch.float16, SM90, ran.append)

    monkeypatch.setattr(tables, "_median", lambda function: function() or len(ran))
    assert measure([Config(8), Config(4)], r=64) is None and not ran
    monkeypatch.setenv("VITLR_AUTOTUNE", "1")
    assert measure([], r=64) is None, "nothing to choose from"
    assert measure([Config(8), Config(4)], r=64) == Config(8)
    assert measure([Config(8), Config(4)], r=64) is None and ran == [Config(8), Config(4)]
    assert nearest(r=64) == nearest(r=64, M=None) == {"BM": 8}, "a size that is not known is not compared"
    assert nearest(r=64, M=197) == {"BM": 16}


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setenv("VITLR_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not tables.autotuning()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tables.autotuning()


@pytest.mark.parametrize("content", ["{", "[1]", '{"rows": 1}', '[{"target": "sm_90"}]', ""])
def test_a_damaged_cache_counts_as_none(content):
    tables.cache_file("toy").parent.mkdir(parents=True)
    tables.cache_file("toy").write_text(content)
    assert nearest(r=64, M=12608) == {"BM": 128}


def test_shipped_tables_name_known_targets_and_say_on_what_they_rest(monkeypatch):
    monkeypatch.undo()
    for path in tables.SHIPPED.glob("*.json"):
        for row in json.loads(path.read_text()):
            assert row["target"] in TARGETS and row["bits"] in (16, 32, 64) and row["config"] and row["from"], path
