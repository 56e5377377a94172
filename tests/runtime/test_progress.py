"""Bars: at a terminal by default, none where nobody looks or nobody wants any, one at a time."""

from __future__ import annotations

import io
import sys

import pytest

import vitlr
from vitlr.runtime.progress import bar, shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes stderr a terminal from now on."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")

    def begin() -> Terminal:  # pytest puts its own stderr in place between a fixture and its test
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return begin


def test_python_draws_a_bar_at_a_terminal(tiny_vit, batches, terminal):
    screen = terminal()
    stats = vitlr.calibrate(tiny_vit(), batches, hidden=False)
    assert "calibrating" in screen.getvalue() and "images/s" in screen.getvalue()
    vitlr.plan(tiny_vit(), stats, "params:70%", rank_step=4)
    assert "solving" in screen.getvalue()
    vitlr.evaluate(tiny_vit(), batches)
    assert "evaluating" in screen.getvalue()


def test_compress_draws_one_for_every_stage(tiny_vit, batches, terminal):
    screen = terminal()
    vitlr.compress(tiny_vit(), batches, "params:70%", rank_step=4)
    assert "calibrating" in screen.getvalue() and "solving" in screen.getvalue()


def test_false_draws_none(tiny_vit, batches, terminal):
    screen = terminal()
    vitlr.evaluate(tiny_vit(), batches, progress=False)
    vitlr.compress(tiny_vit(), batches, "params:70%", rank_step=4, progress=False)
    assert screen.getvalue() == ""


def test_elsewhere_nothing_is_said(tiny_vit, batches, capsys):
    vitlr.compress(tiny_vit(), batches, "params:70%", rank_step=4)
    assert "calibrating:" not in capsys.readouterr().err


def test_a_function_is_told_instead(tiny_vit, batches, terminal):
    screen, told = terminal(), []
    vitlr.evaluate(tiny_vit(), batches, progress=lambda done, total: told.append(done))
    assert told[-1] == 11 and screen.getvalue() == ""


def test_inside_a_bar_no_other_is_drawn(terminal):
    screen = terminal()
    with bar("outside", 2) as outer, shown(None, "inside", 2) as inner:
        outer(1, 2)
        inner(1, 2)
    assert "outside" in screen.getvalue() and "inside" not in screen.getvalue()
    with shown(None, "afterwards", 1) as draw:
        draw(1, 1)
    assert "afterwards" in screen.getvalue()
