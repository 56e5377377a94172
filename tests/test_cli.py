"""The command line: what it prints where, its exit status, every bad input, and interrupts that lose nothing."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import vitlr
from vitlr import storage
from vitlr.cli import app
from vitlr.statistics import Statistics

NAME = "vit_tiny_patch16_224"
TINY = ["--img-size", "32", "--num-classes", "5"]
TINY += ["--model-kwargs", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"]
KEYS = ["out", "params", "params_kept", "macs", "macs_kept", "bytes", "rungs", "seconds", "images"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads gain nothing on layers this small, and on a busy machine they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Answer:
    def __init__(self, result):
        self.status, self.out, self.err = result.exit_code, result.stdout, result.stderr
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception

    @property
    def json(self):
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


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


def nothing_left(folder: Path, *names: str) -> bool:
    return not any((folder / name).exists() for name in names) and not list(folder.glob(".*.part"))


# --- what it prints ---------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_version(run):
    answer = run("--help")
    assert answer.status == 0
    for command in ("inspect", "compress", "validate", "bench", "doctor", "demo"):
        assert f"\n  {command} " in answer.out
    assert run("--version").out == f"vitlr {vitlr.__version__}\n"


@pytest.mark.parametrize("args", [[], ["nonsense"], ["compress", NAME], ["compress", NAME, "--rank-step", "0"]])
def test_bad_usage_is_status_2(run, args):
    assert run(*args).status == 2


def test_cli_needs_no_timm_to_start():
    slow = ("torch", "timm", "torchvision", "rich", "matplotlib")
    code = f"import sys, vitlr.cli; print([m for m in {slow} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_inspect(run):
    values = run("inspect", NAME, *TINY, "--json").json
    assert values["layers"] == 8 and [row["name"] for row in values["kept"]] == ["head"]
    assert values["share"] == pytest.approx(sum(row["params"] for row in values["targets"]) / values["params"])
    text = run("inspect", NAME, *TINY).out
    assert "blocks.1.mlp.fc2" in text and "the classifier" in text and f"{values['params']:,} parameters" in text


def test_inspect_shows_bypassed_layers(run):
    small = ["--img-size", "32", "--model-kwargs", "embed_dim=32", "depth=1", "num_heads=2"]
    values = run("inspect", "beit_base_patch16_224", *small, "--json").json
    notes = {row["name"]: row["reason"] for row in values["targets"]}
    assert "made visible" in notes["blocks.0.attn.qkv"] and notes["blocks.0.attn.proj"] == ""


def test_compress_writes_a_file_that_the_other_commands_read(run, squeeze, tmp_path, weights, tiny_vit):
    out, data = tmp_path / "small.safetensors", tmp_path / "folder"
    answer = run(*squeeze("--json"))
    values = answer.json
    assert list(values) == KEYS and values["out"] == str(out) and values["rungs"] == [] and values["images"] == 20
    assert values["bytes"] == out.stat().st_size
    small = vitlr.load(out)
    assert sum(p.numel() for p in small.parameters()) == values["params_kept"] <= 0.7 * values["params"]
    assert values["params"] == sum(p.numel() for p in tiny_vit().parameters())
    assert values["macs_kept"] < values["macs"]
    assert small.vitlr_info["recipe"]["data"] == "folder" and str(tmp_path) not in json.dumps(small.vitlr_info)

    checked = run("validate", out, "--data", data, "--json").json
    assert list(checked) == ["top1", "top5", "agreement", "kl", "images", "skipped", "top1_low", "top1_high"]
    assert checked["agreement"] is None and checked["images"] == 20 and checked["top1_low"] <= checked["top1"]
    # One --checkpoint is for the one model that needs it; the two directions agree in who agrees with whom.
    there = run("validate", out, "--data", data, "--reference", NAME, "--checkpoint", weights, *TINY, "--json").json
    back = run("validate", NAME, "--data", data, "--reference", out, "--checkpoint", weights, *TINY, "--json").json
    assert there["top1"] == checked["top1"] and there["kl"] > 0 and there["agreement"] == back["agreement"]
    assert (
        f"{there['kl']:.4f} nats"
        in run("validate", out, "--data", data, "--reference", NAME, "--checkpoint", weights, *TINY).out
    )

    low_rank = run("inspect", out, "--json").json["low_rank"]
    assert {row["name"]: row["rank"] for row in low_rank} == {
        name: module.rank for name, module in small.named_modules() if isinstance(module, vitlr.LowRankLinear)
    }


def test_bench_compares_with_the_dense_model_and_with_another(run, squeeze, tmp_path):
    run(*squeeze())
    out = tmp_path / "small.safetensors"
    values = run("bench", out, "-b", "1,2", "--repeats", "2", "--json").json
    assert values["vs"] == "dense" and values["params"] < values["params_vs"] and values["macs"] < values["macs_vs"]
    assert [row["batch_size"] for row in values["results"]] == [1, 2]
    for row in values["results"]:
        assert row["speedup"] == pytest.approx(row["batch_ms_vs"] / row["batch_ms"])
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch_size"] / row["batch_ms"])
    text = run("bench", out, "-b", "2", "--repeats", "1", "--vs", NAME, "--precision", "bfloat16", *TINY).out
    assert "bfloat16" in text and f"{NAME} images/s" in text
    alone = run("bench", NAME, "-b", "1", "--repeats", "1", *TINY, "--json").json
    assert alone["vs"] is None and "speedup" not in alone["results"][0]


def test_plan_only_writes_nothing_but_the_plan_asked_for(run, squeeze, tmp_path):
    answer = run(*squeeze("--plan-only", out=None))
    assert answer.status == 0 and "blocks.0.mlp.fc1" in answer.out and "kept)" in answer.out
    values = run(*squeeze("--plan-only", "--json", plan_out=tmp_path / "plan.json")).json
    assert list(values) == KEYS and values["out"] is None
    assert vitlr.Plan.load(tmp_path / "plan.json").params_kept == values["params_kept"]
    assert nothing_left(tmp_path, "small.safetensors")


def test_plan_options_reach_the_plan(run, squeeze, tmp_path):
    stats, path = tmp_path / "stats.safetensors", tmp_path / "plan.json"

    def plan(*flags, **options):
        answer = run(*squeeze("--plan-only", *flags, stats=stats, plan_out=path, **options))
        assert answer.status == 0, answer.err
        return vitlr.Plan.load(path)

    first = plan()
    assert all(rank % 4 == 0 for rank in first.ranks.values())
    assert {row.reason for row in plan("--uniform").layers if row.rank is not None} == {"uniform share"}
    assert all(rank >= 8 for rank in plan(min_rank=8).ranks.values())
    assert set(plan(include="mlp", exclude="fc2", budget="params:90%").ranks) <= {f"blocks.{i}.mlp.fc1" for i in (0, 1)}
    assert plan("--centred").centred and plan(objective="output").objective == "output"
    assert plan(budget="macs:80%").macs_kept <= 0.8 * first.macs


def test_statistics_are_reused_without_the_images(run, squeeze, tmp_path):
    stats, out = tmp_path / "stats.safetensors", tmp_path / "small.safetensors"
    assert run(*squeeze(stats=stats)).status == 0
    written, model = stats.read_bytes(), out.read_bytes()
    assert Statistics.load(stats).notes == {
        "complete": True, "images_total": 20, "files_done": 20, "skipped": 0, "data": "folder"
    }  # fmt: skip
    answer = run(*squeeze(stats=stats, data=None))
    assert answer.status == 0 and "calibrating" not in answer.err
    assert out.read_bytes() == model and stats.read_bytes() == written


def test_one_corrupt_image_is_skipped_counted_and_reported(run, squeeze, tmp_path, image_folder):
    data = image_folder(name="holed", images=4)
    (data / "c" / "1.jpg").write_bytes(b"no image")
    stats = tmp_path / "stats.safetensors"
    answer = run(*squeeze("--json", data=data, stats=stats))
    assert answer.json["images"] == 19 and Statistics.load(stats).notes["skipped"] == 1
    assert "warning: skipped 1 of 20 images" in answer.err and "c/1.jpg" in answer.err.replace(os.sep, "/")
    checked = run("validate", tmp_path / "small.safetensors", "--data", data, "--json")
    assert checked.json["skipped"] == 1 and checked.json["images"] == 19


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch):
    """Fail the test if a model is made or an image is read."""

    def fail(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr("vitlr.commands._models.create_model", fail)
    monkeypatch.setattr("vitlr.commands._statistics.open_data", fail)


def test_what_can_be_refused_first_is(refused, squeeze, tmp_path, unread):
    assert "'params:lots' cannot be read" in refused(*squeeze(budget="params:lots"))
    assert "out of range" in refused(*squeeze(budget="params:140%"))
    assert "--out is missing" in refused(*squeeze(out=None))
    assert "cannot write" in refused(*squeeze(out=tmp_path / "nowhere" / "small.safetensors"))
    assert "it is a folder" in refused(*squeeze(out=tmp_path))
    assert "cannot write" in refused(*squeeze(stats=tmp_path / "nowhere" / "stats.safetensors"))
    assert "name two files" in refused(*squeeze(stats=tmp_path / "small.safetensors"))
    assert "'best' is unknown" in refused(*squeeze(objective="best"))
    assert "--rank-buckets" in refused(*squeeze("--uniform", rank_buckets=2))
    assert "--centred" in refused(*squeeze("--centred", objective="normalized"))
    assert "--device 'tpu9' is unknown" in refused(*squeeze(device="tpu9"))
    assert "key=value" in refused(*squeeze(model_kwargs="depth"))
    assert "given twice" in refused(*squeeze(model_kwargs="num_classes=7"))
    assert nothing_left(tmp_path, "small.safetensors", "stats.safetensors")


def test_no_output_replaces_an_input_or_a_stranger(refused, squeeze, tmp_path, weights, unread):
    before = weights.read_bytes()
    assert "--out and --checkpoint are both" in refused(*squeeze(out=weights))
    assert "--stats and --checkpoint are both" in refused(*squeeze(stats=weights))
    copy = tmp_path / "my_only_copy.safetensors"
    copy.write_bytes(before)
    assert "is no vitlr model" in refused(*squeeze(out=copy))
    assert copy.read_bytes() == weights.read_bytes() == before


def test_models_and_checkpoints_that_do_not_fit(refused, squeeze, tmp_path, weights):
    assert "did you mean vit_tiny" in refused("inspect", "vit_tny_patch16_224")
    assert "did you mean vit_tiny" in refused(*[a if a != NAME else "vit_tny_patch16_224" for a in squeeze()])
    assert "no such file" in refused("validate", tmp_path / "none.safetensors", "--data", tmp_path)
    assert "was not written by vitlr" in refused("inspect", weights)
    assert "cannot read checkpoint" in refused(*squeeze(checkpoint=tmp_path / "none.safetensors"))
    assert "does not fit" in refused(*squeeze(checkpoint=weights)[:-1], "num_heads=2", "mlp_ratio=2")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "not a whole safetensors file" in refused(*squeeze())
    assert nothing_left(tmp_path, "small.safetensors")


def test_data_that_cannot_be_used(refused, squeeze, tmp_path, image_folder, weights):
    (tmp_path / "empty").mkdir()
    broken = image_folder(name="broken", classes=("a", "b"), images=2)
    for path in broken.rglob("*.jpg"):
        path.write_bytes(b"no image")
    assert "no data at" in refused(*squeeze(data=tmp_path / "none"))
    assert "there are none" in refused(*squeeze(data=tmp_path / "empty"))
    assert "--data is missing" in refused(*squeeze(data=None))
    assert "none of the 4 images" in refused(*squeeze(data=broken, stats=tmp_path / "stats.safetensors"))
    check = ["validate", NAME, "--checkpoint", weights, *TINY]
    assert "give a class map" in refused(*check, "--data", broken)
    (tmp_path / "map.txt").write_text("a\nb\nc\n")
    (tmp_path / "other.txt").write_text("v\nw\nx\ny\nz\n")
    assert "has 3 classes, the model 5" in refused(*check, "--data", broken, "--class-map", tmp_path / "map.txt")
    assert "names none of" in refused(*check, "--data", broken, "--class-map", tmp_path / "other.txt")
    assert "names none of" in refused(*squeeze(data=broken, class_map=tmp_path / "other.txt"))
    assert "--data is missing" in refused(*check)
    assert nothing_left(tmp_path, "small.safetensors", "stats.safetensors")


def test_budget_that_cannot_be_reached_says_what_can(run, squeeze, tmp_path):
    answer = run(*squeeze(budget="params:10%"))
    assert answer.status == 2 and "cannot be reached" in answer.err and "keeps" in answer.err.splitlines()[-1]
    assert nothing_left(tmp_path, "small.safetensors")


def test_a_model_without_linears(refused, image_folder, tmp_path):
    args = ["compress", "resnet18", "--budget", "params:50%", "--out", tmp_path / "o.safetensors"]
    torch.save(vitlr.create_model("resnet18", num_classes=5).state_dict(), tmp_path / "w.pth")
    data = image_folder(classes=("a",), images=1)
    line = refused(*args, "--checkpoint", tmp_path / "w.pth", "--num-classes", 5, "--data", data)
    assert "no linear that can be compressed" in line and nothing_left(tmp_path, "o.safetensors")


def test_patterns_are_checked_before_images_are_read(refused, squeeze, monkeypatch):
    monkeypatch.setattr("vitlr.commands._statistics.open_data", lambda *a, **k: pytest.fail("too late"))
    assert "is not a regular expression" in refused(*squeeze(include="("))
    assert "matches no compressible linear" in refused(*squeeze(exclude="lstm"))


def test_statistics_that_do_not_fit_are_refused_and_left_alone(run, refused, squeeze, tmp_path, image_folder, tiny_vit):
    stats = tmp_path / "stats.safetensors"
    assert run(*squeeze("--plan-only", stats=stats, include="mlp")).status == 0
    written = stats.read_bytes()
    other = tmp_path / "other.safetensors"
    save_file(tiny_vit(seed=1).state_dict(), other)
    assert "other weights" in refused(*squeeze(stats=stats, checkpoint=other))
    assert "--objective loss, not normalized" in refused(*squeeze(stats=stats, objective="normalized"))
    assert "--samples 1, not 3" in refused(*squeeze(stats=stats, samples=3))
    assert "of other layers (blocks.0.attn.qkv)" in refused(*squeeze(stats=stats))
    within = {"stats": stats, "include": "mlp"}
    assert "20 images of folder, this run asks for 10" in refused(*squeeze(limit=10, **within))
    assert "images of another" in refused(*squeeze(data=image_folder(name="another", images=4), **within))
    # The layers' weights are the same at another image size; what they saw is not.
    larger = tiny_vit(img_size=40)
    larger.load_state_dict({k: v for k, v in tiny_vit().state_dict().items() if k != "pos_embed"}, strict=False)
    save_file(larger.state_dict(), other)
    at_40 = [a if a != "32" else "40" for a in squeeze(**within, checkpoint=other)]
    assert "images (3, 32, 32), the model takes (3, 40, 40)" in refused(*at_40)
    assert stats.read_bytes() == written

    stats.write_bytes(written[: len(written) // 2])
    assert "not a whole safetensors file" in refused(*squeeze(stats=stats))
    storage.save_tensors(stats, {}, {}, kind="statistics", schema=99)
    assert "schema 99" in refused(*squeeze(stats=stats))
    save_file({"x": torch.zeros(1)}, stats)
    assert "was not written by vitlr" in refused(*squeeze(stats=stats))
    assert nothing_left(tmp_path, "small.safetensors")


def test_options_that_a_file_has_no_use_for(run, refused, squeeze, tmp_path, weights):
    run(*squeeze())
    out = tmp_path / "small.safetensors"
    assert "--checkpoint goes with a timm name" in refused("inspect", out, "--checkpoint", weights)
    assert "num_classes goes with a timm name" in refused("bench", out, "--num-classes", 7)
    assert "cannot be read" in refused("bench", out, "--batch-size", "1,x")
    assert "--precision 'int3' is unknown" in refused("bench", out, "--precision", "int3")
    assert "goes with --reference" in refused("validate", out, "--data", tmp_path, "--reference-checkpoint", weights)
    other = ["--reference", NAME, "--checkpoint", weights, "--model-kwargs", "in_chans=1"]
    assert "error" in refused("validate", out, "--data", tmp_path / "folder", *other)


# --- runs that fail ---------------------------------------------------------------------------------------------------


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
    [("_decode", 15, 8), ("backward", 2, 16), ("backward", 3, 20)],
)
def test_interrupted_calibration_goes_on_and_gives_the_same_file(
    run, squeeze, tmp_path, monkeypatch, image_folder, where, at, done, number
):
    """While images are read, in the middle of a batch, in the last batch; with a corrupt image in the first batch."""
    data = image_folder(name="holed", images=4)
    stats, out = tmp_path / "stats.safetensors", tmp_path / "small.safetensors"
    from vitlr.data import spread

    files = sorted(data.rglob("*.jpg"))
    files[spread(20)[3]].write_bytes(b"no image")
    again = squeeze("--json", data=data, stats=stats, workers=0)
    assert run(*again).json["images"] == 19
    whole = stats.read_bytes(), out.read_bytes()
    stats.unlink(), out.unlink()

    owner = {"_decode": vitlr.data._Images, "backward": torch.Tensor}[where]
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
    from vitlr.data import spread

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
    monkeypatch.setattr("vitlr.commands._statistics._LEAST", 0.0)
    monkeypatch.setattr("vitlr.commands._statistics._SHARE", 1e9)

    def look(*args, **kwargs):
        seen.append(Statistics.load(stats).notes["files_done"] if stats.exists() else None)
        return before(*args, **kwargs)

    before = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", look)
    assert run(*squeeze(stats=stats)).status == 0 and seen == [None, 8, 16]
    stats.unlink()
    seen.clear()
    monkeypatch.setattr("vitlr.commands._statistics._LEAST", 5.0)
    assert run(*squeeze(stats=stats)).status == 0 and seen == [None, None, None]


def test_sigterm_ends_the_program_with_130(squeeze, tmp_path):
    """Through `main`, in its own process, where no batch is in flight and no statistics are kept."""
    driver = "import os, signal, vitlr.cli, vitlr.pipeline as p\n"
    driver += "p.plan = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\nvitlr.cli.main()"
    command = [sys.executable, "-c", driver, *map(str, squeeze())]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "error: interrupted" and done.stdout == ""
    assert "Traceback" not in done.stderr and nothing_left(tmp_path, "small.safetensors")
