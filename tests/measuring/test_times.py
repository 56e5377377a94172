"""The table of measured times: what is timed, what lies between, and the file that keeps it."""

from __future__ import annotations

import json
import logging
import os
import stat

import pytest
import torch
from fake_clock import FakeClock

from vitlr.errors import InputError
from vitlr.measuring import clock, times, times_file
from vitlr.measuring.specimens import Shape, specimen
from vitlr.measuring.times import Times
from vitlr.nn import Int8Linear, Int8MLP, LowRankLinear, LowRankMLP

LINEAR, MLP = Shape((96, 64), 40), Shape((64, 256, 64), 40, 1, "gelu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def ticking(monkeypatch):
    fake = FakeClock(1)
    monkeypatch.setattr(clock, "race", fake)
    return fake


def table(*shapes, dtype=torch.float32):
    forms = {shape: [*times.wanted(shape, False), *times.wanted(shape, True)] for shape in shapes}
    return Times(8, 1, str(dtype).removeprefix("torch."), 1.0, times.timed(forms, 1, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_specimens_are_of_the_classes_that_fuse_puts_there(dtype):
    kinds = {
        (LINEAR, None, False): torch.nn.Linear,
        (LINEAR, 16, False): LowRankLinear,
        (LINEAR, None, True): Int8Linear,
        (LINEAR, 16, True): LowRankLinear,
        (MLP, 16, False): LowRankMLP,
        (MLP, None, True): Int8MLP,
        (MLP, 16, True): Int8MLP,
    }
    for (shape, rank, int8), kind in kinds.items():
        module, x = specimen(shape, shape.width, rank, int8, dtype)
        assert type(module) is kind and x.dtype == dtype and len(x) == 40
        with torch.no_grad():
            y = module(x)
        assert y.shape == (40, 64) and y.dtype == dtype and torch.isfinite(y).all() and y.std() > 0.01
    narrow, x = specimen(MLP, 96, None, False, dtype)
    assert narrow.fc1.out_features == narrow.fc2.in_features == 96 and narrow(x).shape == (40, 64)


@pytest.mark.parametrize("int8", [False, True])
def test_between_what_was_timed_times_lie_on_straight_lines(ticking, int8):
    found = table(LINEAR, MLP)
    for rank in (None, 16, 24, 36):
        module, x = specimen(LINEAR, 0, rank, int8, torch.float32)
        assert found.ms(LINEAR, 0, rank, int8) == pytest.approx(ticking.ms(module, x))
    for width in (64, 100, 256):
        for rank in (None, 16, 29, 40):
            module, x = specimen(MLP, width, rank, int8, torch.float32)
            assert found.ms(MLP, width, rank, int8) == pytest.approx(ticking.ms(module, x), rel=0.02)


def test_a_smaller_shape_that_was_disturbed_takes_no_longer_than_a_larger_one(ticking):
    found = table(LINEAR)
    largest = times.ranks(LINEAR, 0)[-1]
    disturbed = dict(found.measured)
    disturbed[LINEAR.named(0, 16, False, "float32")] *= 10
    again = Times(8, 1, "float32", 1.0, disturbed)
    assert again.ms(LINEAR, 0, 16, False) <= found.ms(LINEAR, 0, largest, False)


def test_more_rows_than_are_timed_take_as_long_each(ticking):
    long, short = Shape((96, 64), 9000), Shape((96, 64), 2048)
    assert table(long).ms(long, 0, None, False) == pytest.approx(table(short).ms(short, 0, None, False) * 9000 / 2048)


def test_what_was_timed_once_is_read_from_the_file(ticking, folder):
    first = table(LINEAR, MLP)
    raced = len(ticking.raced)
    assert table(LINEAR, MLP).measured == first.measured and len(ticking.raced) == raced
    assert os.listdir(folder / "vitlr") == ["times.json"]
    other = Shape((96, 128), 40)
    table(LINEAR, other)
    assert all("96x128" in name for name in ticking.raced[raced:])
    assert len(table(LINEAR, MLP, other).measured) > len(first.measured)


def test_times_of_other_threads_builds_and_backends_are_not_read(ticking, monkeypatch):
    times_file.add(1, {"a": 1.0})
    assert times_file.read(1) == {"a": 1.0} and times_file.read(2) == {}
    monkeypatch.setenv("VITLR_BACKEND", "torch")
    assert times_file.read(1) == {}
    monkeypatch.delenv("VITLR_BACKEND")
    monkeypatch.setattr(times_file, "_build", lambda: "another")
    assert times_file.read(1) == {}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"schema": 1}',
        '{"schema": 1, "machines": {"m": {"a": -1}}}',
        '{"schema": 1, "machines": {"m": 2}}',
    ],
)
def test_a_damaged_file_is_said_and_measured_again(ticking, caplog, content):
    path = times_file.place()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "vitlr"):
        found = table(LINEAR)
    assert "is damaged" in caplog.text and found.ms(LINEAR, 0, None, False) > 0
    assert times_file.read(1).keys() == found.measured.keys()


def test_a_file_of_a_newer_layout_counts_as_none(ticking):
    path = times_file.place()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema": 2, "machines": {times_file.machine(1): {"a": 1.0}}}))
    assert times_file.read(1) == {}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_where_nothing_can_be_kept_times_are_measured_all_the_same(ticking, folder, caplog):
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with caplog.at_level(logging.WARNING, "vitlr"):
        assert table(LINEAR).ms(LINEAR, 0, None, False) > 0
    assert "are not kept" in caplog.text


def test_the_clock_runs_everything_in_turns_and_gives_threads_and_modes_back():
    calls = []

    class Counted(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append((self.name, self.training, torch.get_num_threads()))
            return x @ x

    a, b, x = Counted("a").train(), Counted("b").eval(), torch.randn(200, 200)
    before = torch.get_num_threads()
    found = clock.race({"a": (a, x), "b": (b, x)}, 1)
    assert found["a"] > 0 and found["b"] > 0 and a.training and torch.get_num_threads() == before
    assert {training for _, training, _ in calls} == {False} and {threads for *_, threads in calls} == {1}
    names = [name for name, *_ in calls]
    assert names.count("a") > 5 and names.count("b") > 5


def test_a_model_counts_block_by_block_each_by_its_least(monkeypatch):
    now, slow = [0.0], iter([5, 1, 1] + [1, 5, 1] + [1, 1, 5] * 100)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Identity()

        def forward(self, x):
            now[0] += next(slow)
            return x

    monkeypatch.setattr(clock.time, "thread_time", lambda: now[0])
    model = torch.nn.Sequential(torch.nn.Sequential(*(Block() for _ in range(3))))
    assert clock.race({"model": (model, torch.zeros(1))}, 1)["model"] == pytest.approx(3e3)
    assert not any(block._forward_pre_hooks for block in model.modules())


def test_more_threads_than_cores_are_refused():
    with pytest.raises(InputError, match=r"threads=4096: this process may use \d+ cores"):
        clock.check_threads(4096)
    assert clock.check_threads(1) == 1 and clock.check_threads(None) == torch.get_num_threads()
