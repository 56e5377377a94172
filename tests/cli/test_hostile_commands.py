"""The shell beside devices, pipes, strangers and strange names: one line, exit status 2, nothing replaced."""

import json
import os
import random
import stat

import pytest


@pytest.mark.parametrize("flag", ["out", "plan_out", "stats"])
def test_no_output_replaces_a_pipe_a_device_or_a_stranger(refused, squeeze, tmp_path, flag):
    os.mkfifo(tmp_path / "pipe")
    stranger = tmp_path / "thesis.txt"
    stranger.write_text("my only copy")
    for place in (tmp_path / "pipe", "/dev/null", stranger):
        refused(*squeeze(**{flag: place}))
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert stranger.read_text() == "my only copy" and not list(tmp_path.glob(".*.part"))


def test_an_earlier_plan_may_be_replaced(run, squeeze, tmp_path):
    for _ in range(2):
        assert run(*squeeze("--plan-only", plan_out=tmp_path / "plan.json", out=None)).status == 0


def test_one_place_for_the_snapshots_and_the_result_is_refused_at_the_start(refused, squeeze, tmp_path, unread):
    place = tmp_path / "x"
    assert "--out and --resume are both" in refused(*squeeze(refine="refit", resume=place, out=place))
    assert not place.exists()


def test_names_of_any_bytes_and_any_length_are_refused_in_one_short_line(run, refused, squeeze, image_folder):
    folder = image_folder(name="other")
    for name in (os.fsdecode(b"\xff\xfe.safetensors"), "x" * 5000 + ".safetensors", "\n\r\t.pt"):
        for command in (["inspect", name], ["validate", name, "--data", folder], squeeze(checkpoint=name)):
            assert len(refused(*command)) < 2000
    answer = run(*squeeze("--plan-only", plan_out=folder / os.fsdecode(b"\xff.json"), out=None))
    assert answer.status == 0, answer.err


def test_random_command_lines_end_with_one_line_and_status_2(run, tmp_path):
    rng = random.Random(7)
    words = [
        "compress",
        "inspect",
        "validate",
        "prune",
        "finetune",
        "vit_tny",
        "none.pt",
        "--data",
        "--out",
        "--budget",
        "--limit",
    ]
    words += [
        "--budget",
        "--limit",
        "params:70%",
        "params:-1%",
        "bytes:1e999",
        "nan",
        "/dev/zero",
        str(tmp_path),
        "--stats",
        "--class-map",
    ]
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
