"""Timing in turns, and progress that never touches stdout."""

from __future__ import annotations

import io
import sys
import time

import pytest
import torch

from vitlr.errors import InputError
from vitlr.measuring.timing import compare, forward, throughput
from vitlr.runtime.progress import bar


def test_takes_turns_and_finds_the_slower_one():
    calls: list[str] = []

    def sleeper(name: str, seconds: float):
        def run() -> None:
            calls.append(name)
            time.sleep(seconds)

        return run

    found = compare(
        {"fast": sleeper("fast", 0.002), "slow": sleeper("slow", 0.006)}, repeats=4, warmup=1, min_seconds=0.001
    )
    assert calls[2:] == ["fast", "slow", "slow", "fast", "fast", "slow", "slow", "fast"]
    fast, slow = found["fast"], found["slow"]
    assert 0.002 <= fast.min <= fast.median and 0.006 <= slow.min <= slow.median
    assert slow.min > 1.5 * fast.min
    assert (fast.repeats, fast.calls) == (4, 1)


def test_short_functions_are_called_often_enough():
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    found = compare({"tick": tick}, repeats=2, warmup=2, min_seconds=0.001)["tick"]
    assert found.calls > 100 and count == 2 + 2 * found.calls
    assert 0 < found.min < 1e-4


def test_by_the_clock_of_the_processor_waiting_takes_no_time():
    found = compare({"waits": lambda: time.sleep(0.05)}, repeats=2, warmup=1, clock=time.process_time)["waits"]
    assert found.min < 0.02


def test_nothing_to_time_is_refused():
    for wrong in ({}, {"repeats": 0}, {"warmup": 0}):
        with pytest.raises(InputError, match="expected at least 1 of each"):
            compare({} if not wrong else {"a": time.time}, **wrong)


def test_forward_runs_the_model_on_its_own_size_and_dtype(tiny_vit):
    model = tiny_vit().to(torch.bfloat16)
    run = forward(model, 3)
    logits = run()
    assert logits.shape == (3, 5) and logits.dtype == torch.bfloat16 and not logits.requires_grad
    assert torch.equal(run(), logits) and logits.std() > 0
    assert forward(torch.nn.Flatten(), 2, input_size=(1, 4, 4))().shape == (2, 16)
    with pytest.raises(InputError, match="batch_size=0"):
        forward(model, 0)


def test_throughput_compares_models_and_leaves_them_alone(tiny_vit):
    small, large = tiny_vit().train(), tiny_vit(depth=12)
    found = throughput({"small": small, "large": large}, 4, repeats=3, warmup=1)
    assert small.training and not large.training
    assert found["small"]["images_per_second"] > 1.5 * found["large"]["images_per_second"]
    for numbers in found.values():
        assert numbers["images_per_second"] == pytest.approx(4000 / numbers["batch_ms"])
        assert numbers["batch_ms"] <= numbers["batch_ms_median"]
    assert list(throughput(small, 2, repeats=1, warmup=1)) == ["model"]


def test_models_on_two_devices_are_refused(tiny_vit):
    with pytest.raises(InputError, match="cpu, meta"):
        throughput({"a": tiny_vit(), "b": tiny_vit().to("meta")}, 2)


def test_progress_writes_one_line_where_there_is_no_terminal(capsys):
    with bar("calibrate") as progress:
        progress(8, 20)
        progress(20, 20)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("calibrate: 20 images in ") and err.count("\n") == 1


def test_progress_draws_at_a_terminal(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", terminal)
    with bar("validate", unit="layers") as progress:
        progress(3, 12)
        progress(12, 12)
    drawn = terminal.getvalue()
    assert "validate" in drawn and "12/12" in drawn and "layers/s" in drawn
    assert capsys.readouterr().out == ""


def test_progress_says_nothing_about_a_stage_that_failed(capsys):
    with pytest.raises(KeyboardInterrupt), bar("decompose", 48, "layers") as progress:
        progress(3)
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""
