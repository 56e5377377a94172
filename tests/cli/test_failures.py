"""Runs that fail or are interrupted: the exit status says so, and nothing is lost."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from commandline import nothing_left
from safetensors.torch import save_file

import vitlr
from vitlr.calibration.statistics import Statistics


def test_disk_full_is_status_1_and_leaves_nothing(run, squeeze, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert run(*squeeze()).status == 0
    before = (tmp_path / "small.safetensors").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        answer = run(*squeeze())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    last = answer.err.splitlines()[-1]
    assert answer.status == 1 and last.startswith("error: could not write") and answer.out == ""
    assert nothing_left(tmp_path) and (tmp_path / "small.safetensors").read_bytes() == before


def test_weights_that_give_nan_are_status_1_and_leave_nothing(run, squeeze, tmp_path, tiny_vit, weights):
    model = tiny_vit()
    model.blocks[1].mlp.fc2.weight.data[0, 0] = float("nan")
    save_file(model.state_dict(), weights)
    answer = run(*squeeze(objective="output", stats=tmp_path / "stats.safetensors"))
    assert answer.status == 1 and "blocks.1.mlp.fc2" in answer.err.splitlines()[-1]
    assert nothing_left(tmp_path, "small.safetensors", "stats.safetensors")


def kill(function, at: int, number: int, times: int = 1):
    """`function`, sending this process a signal at its `at`-th call; calibration calls `backward` once a batch."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(None)
        for _ in range(times if len(calls) == at else 0):
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("where", "at", "done"),
    [("decode", 15, 8), ("backward", 2, 16), ("backward", 3, 20)],
)
def test_interrupted_calibration_goes_on_and_gives_the_same_file(
    run, squeeze, tmp_path, monkeypatch, image_folder, where, at, done, number
):
    """While images are read, in the middle of a batch, in the last batch; with a corrupt image in the first batch."""
    data = image_folder(name="holed", images=4)
    stats, out = tmp_path / "stats.safetensors", tmp_path / "small.safetensors"
    from vitlr.data.loader import spread

    files = sorted(data.rglob("*.jpg"))
    files[spread(20)[3]].write_bytes(b"no image")
    again = squeeze("--json", data=data, stats=stats, workers=0)
    assert run(*again).json["images"] == 19
    whole = stats.read_bytes(), out.read_bytes()
    stats.unlink(), out.unlink()

    owner = {"decode": vitlr.data.loader, "backward": torch.Tensor}[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, kill(getattr(owner, where), at, number))
        answer = run(*again)
    assert answer.status == 130 and answer.out == "" and nothing_left(tmp_path, "small.safetensors")
    last = answer.err.splitlines()[-1]
    assert last.startswith(f"error: interrupted; {done} of 20 images are in ") and "to go on" in last
    found = Statistics.load(stats)
    assert not found.notes["complete"] and found.notes["files_done"] == done and found.images == done - 1

    answer = run(*again)
    assert answer.status == 0 and answer.json["images"] == 19
    assert (stats.read_bytes(), out.read_bytes()) == whole
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_second_interrupt_does_not_wait_and_without_stats_nothing_is_kept(run, squeeze, tmp_path, monkeypatch):
    stats = tmp_path / "stats.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", kill(torch.Tensor.backward, 2, signal.SIGINT, times=2))
        answer = run(*squeeze(stats=stats))
    assert answer.status == 130 and "nothing more was saved" in answer.err
    assert nothing_left(tmp_path, "small.safetensors", "stats.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", kill(torch.Tensor.backward, 2, signal.SIGINT))
        answer = run(*squeeze())
    assert answer.status == 130 and "--stats" in answer.err and nothing_left(tmp_path, "small.safetensors")


def test_statistics_cut_short_need_the_rest_of_the_same_images(run, refused, squeeze, tmp_path, monkeypatch):
    stats = tmp_path / "stats.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", kill(torch.Tensor.backward, 1, signal.SIGINT))
        assert run(*squeeze(stats=stats)).status == 130
    assert "was cut short" in refused(*squeeze(stats=stats, data=None))
    assert "of other layers" in refused(*squeeze(stats=stats, include="mlp"))
    assert "this run asks for 12" in refused(*squeeze(stats=stats, limit=12))
    found = Statistics.load(stats)
    found.notes["files_done"] = 21
    found.save(stats)
    assert "notes are damaged" in refused(*squeeze(stats=stats))


def test_rest_that_is_all_corrupt_ends_a_resumed_run(run, squeeze, tmp_path, monkeypatch, image_folder):
    from vitlr.data.loader import spread

    data, stats = image_folder(name="holed", images=4), tmp_path / "stats.safetensors"
    files = sorted(data.rglob("*.jpg"))
    for index in spread(20)[16:]:
        files[index].write_bytes(b"no image")
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", kill(torch.Tensor.backward, 2, signal.SIGINT))
        assert run(*squeeze(stats=stats, data=data)).status == 130
    assert run(*squeeze("--json", stats=stats, data=data)).json["images"] == 16
    assert Statistics.load(stats).notes["skipped"] == 4 and Statistics.load(stats).notes["complete"]


def test_statistics_are_saved_on_the_way(run, squeeze, tmp_path, monkeypatch):
    """A kill that nothing can catch loses little: the file on disk follows the run, in a small share of its time."""
    stats, seen = tmp_path / "stats.safetensors", []
    monkeypatch.setattr("vitlr.calibration.resuming._LEAST", 0.0)
    monkeypatch.setattr("vitlr.calibration.resuming._SHARE", 1e9)

    def look(*args, **kwargs):
        seen.append(Statistics.load(stats).notes["files_done"] if stats.exists() else None)
        return before(*args, **kwargs)

    before = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", look)
    assert run(*squeeze(stats=stats)).status == 0 and seen == [None, 8, 16]
    stats.unlink()
    seen.clear()
    monkeypatch.setattr("vitlr.calibration.resuming._LEAST", 5.0)
    assert run(*squeeze(stats=stats)).status == 0 and seen == [None, None, None]


def test_sigterm_ends_the_program_with_130(squeeze, tmp_path):
    """Through `main`, in its own process, where no batch is in flight and no statistics are kept."""
    driver = "import os, signal, vitlr.cli, vitlr.compression as p\n"
    driver += "p.plan = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\nvitlr.cli.main()"
    command = [sys.executable, "-c", driver, *map(str, squeeze())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "error: interrupted" and done.stdout == ""
    assert "Traceback" not in done.stderr and nothing_left(tmp_path, "small.safetensors")
