"""The shell beside devices, pipes, strangers and strange names: one line, exit status 2, nothing replaced."""

import json
import os
import random
import stat

import pytest
from commandline import NAME, Answer
from typer.testing import CliRunner

from vitlr.cli.app import app


@pytest.fixture
def run():
    return lambda *args: Answer(CliRunner().invoke(app, [str(arg) for arg in args]))


def compress(data, *more):
    return ["compress", NAME, "--data", data, "--budget", "params:70%", *more]


@pytest.mark.parametrize("flag", ["--out", "--plan-out", "--stats"])
def test_no_output_replaces_a_pipe_a_device_or_a_stranger(run, image_folder, tmp_path, flag):
    data, out = image_folder(), [] if flag == "--out" else ["--out", tmp_path / "m.safetensors"]
    os.mkfifo(tmp_path / "pipe")
    stranger = tmp_path / "thesis.txt"
    stranger.write_text("my only copy")
    for place in (tmp_path / "pipe", "/dev/null", stranger):
        answer = run(*compress(data, *out, flag, place))
        assert answer.status == 2 and answer.err.count("\n") == 1, answer.err
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stranger.read_text() == "my only copy" and not list(tmp_path.glob(".*.part"))


def test_one_place_for_the_snapshots_and_the_result_is_refused_at_the_start(run, image_folder, tmp_path):
    place = tmp_path / "x"
    answer = run(*compress(image_folder(), "--refine", "refit", "--resume", place, "--out", place))
    assert answer.status == 2 and "--out and --resume are both" in answer.err
    assert not place.exists()


def test_names_of_any_bytes_and_any_length_are_refused_in_one_short_line(run, image_folder, tmp_path):
    folder = image_folder()
    for name in (os.fsdecode(b"\xff\xfe.safetensors"), "x" * 5000 + ".safetensors", "a\0b.safetensors", "\n\r\t.pt"):
        for command in (["inspect", name], ["validate", name, "--data", folder], compress(folder, "--out", name)):
            answer = run(*command)
            assert answer.status in (1, 2) and answer.err.count("\n") == 1 and len(answer.err) < 2000, answer.err[:300]


def test_random_command_lines_end_with_one_line_and_status_2(run, tmp_path):
    rng = random.Random(7)
    words = ["compress", "inspect", "validate", "prune", "finetune", NAME, "--data", "--out", "--budget", "--limit"]
    words += ["params:70%", "params:-1%", "bytes:1e999", "nan", "/dev/zero", str(tmp_path), "--stats", "--class-map"]
    words += ["--model-kwargs", "depth=10**9", "img_size=-1", "--img-size", "0", "-1", "99999999999999999999", "--json"]
    words += ["--checkpoint", "/dev/null", "\ud800", "", "=", "--", "--refine", "distil", "--steps", "x" * 3000, "{}"]
    for _ in range(150):
        line = [rng.choice(words[:5]), *(rng.choice(words) for _ in range(rng.randint(0, 8)))]
        answer = run(*line)
        assert answer.status == 2, (line, answer.err[:500])
        assert "Traceback" not in answer.err and len(answer.err) < 5000, line


def test_headers_that_could_not_be_read_back_are_not_written(tiny_vit, tmp_path):
    from vitlr.checkpoint import files
    from vitlr.errors import InputError

    deep = json.loads("[" * 40 + "]" * 40)
    for recipe in (deep, {"note": "x" * 17 * 2**20}):
        with pytest.raises(InputError):
            files.save(tiny_vit(), tmp_path / "m.safetensors", recipe=recipe)
    assert not list(tmp_path.iterdir())
