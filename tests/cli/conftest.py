"""Fixtures that run `vitlr` in this process on a model of milliseconds."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from commandline import NAME, TINY, Answer
from safetensors.torch import save_file
from typer.testing import CliRunner

from vitlr.cli.app import app


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads gain nothing on layers this small, and on a busy machine they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _interrupts():
    """Interrupts as a terminal gives them: a suite started in the background inherits SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run():
    """A function that runs `vitlr` in this process."""
    return lambda *args: Answer(CliRunner().invoke(app, [str(arg) for arg in args]))


@pytest.fixture
def refused(run):
    """A function that runs `vitlr` and returns its one line of error, given the expected exit status."""

    def check(*args, status=2):
        answer = run(*args)
        lines = answer.err.splitlines()
        assert answer.status == status, (answer.status, answer.err)
        assert answer.out == "" and len(lines) == 1 and lines[0].startswith("error: "), answer.err
        return lines[0]

    return check


@pytest.fixture
def weights(tiny_vit, tmp_path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(tiny_vit().state_dict(), path)
    return path


@pytest.fixture
def squeeze(weights, image_folder, tmp_path):
    """The arguments of a small `compress`; keywords replace or add options, None takes one out."""
    data = image_folder(images=4)
    usual = {"checkpoint": weights, "data": data, "budget": "params:70%", "rank-step": 4, "batch-size": 8}
    usual |= {"out": tmp_path / "small.safetensors"}

    def make(*flags, **options):
        options = {**usual, **{key.replace("_", "-"): value for key, value in options.items()}}
        given = [text for key, value in options.items() if value is not None for text in (f"--{key}", value)]
        return ["compress", NAME, *given, *flags, *TINY]

    return make


@pytest.fixture
def unread(monkeypatch):
    """Fail the test if a model is made or an image is read."""

    def fail(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr("vitlr.cli.models.create_model", fail)
    monkeypatch.setattr("vitlr.data.loader.open_data", fail)
