"""Two and four processes come to what one comes to; one of them writes, and one that dies ends them all."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import pytest
import together
import torch
from commandline import NAME, TINY
from safetensors.torch import save_file
from torch.utils.data import DataLoader, DistributedSampler

from vitlr.calibration import loop, resuming
from vitlr.calibration.loop import calibrate
from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint import files
from vitlr.checkpoint.creation import create_model
from vitlr.compression import compressed
from vitlr.data.loader import open_data
from vitlr.decomposition import ranks
from vitlr.errors import InputError, NumericalError
from vitlr.planning.planner import plan
from vitlr.planning.plans import Plan
from vitlr.runtime import processes, storage
from vitlr.training import train

ALL = {"objective": ("fisher", "output", "normalized"), "extras": ("rounding", "ranges", "row_gradient")}


def tiny(seed=0):
    torch.manual_seed(seed)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = create_model("vit_tiny_patch16_224", **size)
    for p in model.parameters():
        p.data += torch.randn_like(p) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    return model


def batches(count=7, size=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size - (i == count - 1), 3, 32, 32, generator=generator) for i in range(count)]


def close(one, two):
    """Sums that differ by the order in which they were added, in float64."""
    assert (one.images, list(one.layers), one.answer) == (two.images, list(two.layers), two.answer)
    assert one.others.keys() == two.others.keys()
    for name, layer in one.layers.items():
        other = two.layers[name]
        assert layer.tokens == other.tokens and layer.held.keys() == other.held.keys()
        for key, tensor in layer.sums():
            torch.testing.assert_close(tensor, other.sum(key), rtol=1e-12, atol=1e-12 * float(tensor.abs().max()))
    for name, lost in one.others.items():
        torch.testing.assert_close(lost, two.others[name], rtol=1e-12, atol=0)


def measured(*given, **options):
    return calibrate(tiny(), *given, **{**ALL, "hidden": "attention", **options})


@pytest.mark.parametrize("count", [2, 4])
def test_processes_measure_what_one_measures_and_all_know_it(count):
    alone = measured(batches())
    found = together.run(measured, count, batches())
    close(found[0], alone)
    for other in found[1:]:  # to the bit: it is process 0's
        for name, layer in found[0].layers.items():
            assert all(torch.equal(tensor, other.layers[name].sum(key)) for key, tensor in layer.sums())
        assert other.images == alone.images and str(other) == str(alone)


def test_there_may_be_fewer_batches_than_processes():
    close(together.run(measured, 4, batches(1))[3], measured(batches(1)))


def data(path, size):
    return open_data(path, tiny(), batch_size=size, workers=0)


def of_folder(path, stats=None, **how):
    loader = data(path, 3)
    return calibrate(tiny(), loader, resume=stats, **how), loader.skipped


def test_files_are_dealt_out_by_batches_and_those_that_are_broken_are_counted_once(image_folder):
    path = image_folder(images=5)
    for broken in ("a/0.jpg", "c/3.jpg"):
        (path / broken).write_bytes(b"none")
    alone, skipped = of_folder(path)
    for found, skipped_here in together.run(of_folder, 4, path):
        close(found, alone)
        assert skipped_here == skipped == 2


def test_a_process_whose_files_are_all_broken_is_no_reason_to_stop(image_folder):
    path = image_folder(images=2)
    loader = data(path, 3)
    second_batch = [loader.dataset.reader.filename(i, absolute=True) for i, _ in loader.dataset.chosen[3:6]]
    for name in second_batch:
        (path / name).write_bytes(b"none")
    close(together.run(of_folder, 2, path)[1][0], of_folder(path)[0])


def test_where_no_file_can_be_read_all_say_so(image_folder):
    path = image_folder(images=1)
    for file in path.glob("*/*.jpg"):
        file.write_bytes(b"none")
    for found in together.run(of_folder, 2, path):
        assert isinstance(found, InputError) and "none of the 5 images" in str(found)


def interrupted(path, file, rounds):
    """A calibration that process 1 is told to end after so many rounds."""
    seen = []

    def look(stats):
        seen.append(stats)
        if processes.rank() == 1 and len(seen) == rounds:
            os.kill(os.getpid(), signal.SIGINT)

    return of_folder(path, file, on_batch=look)


def test_an_interrupt_of_one_ends_all_and_any_number_go_on_from_the_file(image_folder, tmp_path):
    path, file = image_folder(images=6), tmp_path / "s.safetensors"
    for found in together.run(interrupted, 2, path, file, 2):
        assert isinstance(found, KeyboardInterrupt) and "18 of 30 images are in" in str(found)
    kept = Statistics.load(file)
    assert kept.images == 18 and kept.notes["complete"] is False
    for count in (4, 1):
        copy = tmp_path / f"{count}.safetensors"
        copy.write_bytes(file.read_bytes())
        found = together.run(of_folder, count, path, copy)[-1][0] if count > 1 else of_folder(path, copy)[0]
        close(found, of_folder(path)[0])
        close(Statistics.load(copy), found)
        assert Statistics.load(copy).notes["complete"] and not list(tmp_path.glob(".*"))


def shuffled(loader, sampler):
    model, data = tiny(), torch.cat(batches())
    torch.manual_seed(processes.rank())
    sampler = DistributedSampler(data, processes.world(), processes.rank(), shuffle=True) if sampler else None
    return calibrate(model, DataLoader(data, 5, shuffle=sampler is None, sampler=sampler))


def test_loaders_that_shuffle_otherwise_everywhere_are_refused_and_distributed_samplers_taken():
    for found in together.run(shuffled, 2, None, False):
        assert isinstance(found, InputError) and "DistributedSampler" in str(found)
    found = together.run(shuffled, 2, None, True)
    assert found[0].images == 42  # 41, and one twice to make shares even
    assert {"blocks.0.attn.qkv"} <= set(found[1].layers)


def other_weights():
    return calibrate(tiny(processes.rank()), batches())


def test_models_of_other_weights_are_refused():
    for found in together.run(other_weights, 2):
        assert isinstance(found, InputError) and "other weights" in str(found)


def planned(stats, budget, options):
    """A plan, and which linears' problems were solved here."""
    solved = []
    whole = ranks._one_by_one
    ranks._one_by_one = lambda prepare, layers: solved.extend(layers) or whole(prepare, layers)
    try:
        made = plan(tiny(), stats, budget, **{"rank_step": 1, "width_step": 4, **options})
    finally:
        ranks._one_by_one = whole
    return made.to_dict(), solved


@pytest.mark.parametrize(
    "budget, options",
    [
        ("params:60%", {}),
        ("params:60%", {"attention": "channels"}),
        ("macs:70%", {"method": "lowrank", "centred": True}),
        ("bytes:30%", {}),
        ("bytes:25%", {"method": "bits"}),
    ],
)
def test_processes_plan_what_one_plans_each_by_a_share_of_the_solves(budget, options):
    alone, layers = planned(measured(batches()), budget, options)
    found = together.run(planned, 2, measured(batches()), budget, options)
    assert [made for made, _ in found] == [alone, alone]
    assert {*found[0][1]} | {*found[1][1]} == {*layers} and not {*found[0][1]} & {*found[1][1]}


def failing(stats):
    for layer in stats.layers.values():
        if layer.name == "blocks.1.attn.qkv":
            layer.gradient = torch.full_like(layer.gradient, torch.nan)
    return plan(tiny(), stats, "params:60%", method="lowrank")


def test_a_solve_that_fails_in_one_is_told_by_all():
    for found in together.run(failing, 2, measured(batches())):
        assert isinstance(found, NumericalError) and "blocks.1.attn.qkv" in str(found)


def alike(name, one, other):
    """Weights after the same steps; a bias of keys changes no answer, so rounding alone is what Adam moves it by."""
    if "qkv" in name and name.endswith("bias"):
        one, other = (torch.cat([t[:32], t[64:]]) for t in (one, other))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def squeezed(rungs, options):
    """Weights after everything: measured, planned, applied and refined, and where the rungs led."""
    model = tiny()
    done = compressed(
        model, batches(8, 8), options.pop("budget", "params:60%"), rank_step=1, amp=False, rungs=rungs, **options
    )
    kls = [(rung.name, rung.kept, rung.after.kl) for rung in done.report.rungs]
    return {name: t.detach() for name, t in done.model.state_dict().items()}, kls, done.plan.to_dict()


def apart(plan):
    """A plan's choices, and the losses that it predicts."""
    losses = [entry["error"] for part in plan.values() if isinstance(part, list) for entry in part if "error" in entry]
    without = {
        key: [{k: v for k, v in entry.items() if k != "error"} for entry in part] if isinstance(part, list) else part
        for key, part in plan.items()
    }
    return without, losses


@pytest.mark.parametrize(
    "count, rungs, options",
    [
        (2, "distil", {"steps": 9, "batch_size": 8, "lr": 1e-3, "regrow_steps": 3, "method": "lowrank"}),
        (4, ("distil",), {"steps": 5, "batch_size": 6, "lr": 1e-3, "method": "widths", "minutes": 5}),
        (2, ("distil",), {"steps": 4, "batch_size": 8, "budget": "bytes:30%"}),
    ],
)
def test_processes_refine_to_the_weights_of_one(count, rungs, options):
    alone, kls, plan = squeezed(rungs, dict(options))
    found = together.run(squeezed, count, rungs, options)
    choices, losses = apart(plan)
    for weights, kls_here, plan_here in found:
        choices_here, losses_here = apart(plan_here)
        assert choices_here == choices
        assert losses_here == pytest.approx(losses, rel=1e-9, abs=1e-15)  # of moments that are within 1e-12
        assert [kl[:2] for kl in kls_here] == [kl[:2] for kl in kls]
        assert [kl[2] for kl in kls_here] == pytest.approx([kl[2] for kl in kls], rel=1e-3)
        assert weights.keys() == alone.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, found[0][0][name]), "all come to the same bits"
            alike(name, tensor, alone[name])


def finetuned(options):
    model, generator = tiny(), torch.Generator().manual_seed(3)
    labelled = [(images, torch.randint(0, 5, (len(images),), generator=generator)) for images in batches(4, 8)]
    seen = []
    report = train(
        model,
        labelled,
        epochs=2,
        lr=1e-3,
        amp=False,
        reference=tiny(1),
        penalty=lambda m: 1e-3 * m.head.weight.square().sum(),
        callbacks=[lambda step: seen.append(step.loss)],
        validate=lambda m: float(m(labelled[0][0]).argmax(1).eq(labelled[0][1]).double().mean()),
        **options,
    )
    return dict(model.named_parameters()), seen, report.to_dict()


@pytest.mark.parametrize("options", [{}, {"mixup": 0.8, "grad_accum_steps": 2, "model_ema": True}])
def test_processes_train_to_the_weights_of_one(options):
    alone, losses, report = finetuned(options)
    found = together.run(finetuned, 2, options)
    for weights, seen, told in found:
        assert seen == pytest.approx(losses, rel=1e-4)
        assert [epoch["validation"] for epoch in told["epochs"]] == [e["validation"] for e in report["epochs"]]
        for name, weight in weights.items():
            assert torch.equal(weight, found[0][0][name])
            alike(name, weight, alone[name])


def normed():
    return train(torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(3072, 5)), [1])


def test_means_over_a_batch_are_refused_where_it_is_shared_out():
    for found in together.run(normed, 2):
        assert isinstance(found, InputError) and "SyncBatchNorm" in str(found)


def timed():
    return compressed(tiny(), batches(), "latency:80%")


def test_milliseconds_are_refused_beside_others():
    for found in together.run(timed, 2):
        assert isinstance(found, InputError) and "milliseconds" in str(found)


@pytest.fixture
def line(image_folder, tmp_path):
    """The arguments of a small `compress` in which nothing is left to decide."""
    weights, data = tmp_path / "weights.safetensors", image_folder(images=8)
    save_file(tiny().state_dict(), weights)
    given = ["--checkpoint", weights, "--data", data, "--budget", "params:70%", "--rank-step", 4, "--batch-size", 4]
    return ["compress", NAME, *given, "--out", tmp_path / "small.safetensors", *TINY]


def ended(children, within=60.0):
    """The exit statuses of processes that end in that time."""
    end = time.monotonic() + within
    for child in children:
        child.join(max(end - time.monotonic(), 0.1))
    late = [child.pid for child in children if child.exitcode is None]
    for child in children:
        child.kill()
    assert not late, f"still there after {within:.0f} s"
    return [child.exitcode for child in children]


def said(folder, count):
    return [[(folder / f"{i}.{stream}").read_text() for stream in ("out", "err")] for i in range(count)]


def unwriting():
    """Let process 1 die of what it writes."""
    if os.environ["RANK"] == "1":
        storage.save_file = lambda *given: os._exit(7)


def test_one_process_writes_and_speaks_and_the_plan_is_that_of_one(line, tmp_path):
    extra = ["--stats", tmp_path / "s", "--plan-out", tmp_path / "plan.json", "--refine", "refit"]
    children = together.shell([*line, *extra, "--resume", tmp_path / "kept"], 2, tmp_path, unwriting)
    assert ended(children, 120) == [0, 0], said(tmp_path, 2)
    (out, err), silent = said(tmp_path, 2)
    assert "wrote" in out and "calibrating: 40 images" in err and silent == ["", ""]
    made = Plan.load(tmp_path / "plan.json")
    alone = plan(tiny(), calibrate(tiny(), data(tmp_path / "folder", 4)), "params:70%", rank_step=4)
    assert str(made) == str(replace(alone, why=""))
    assert files.load(tmp_path / "small.safetensors") is not None
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("change", [["--budget", "parms:70%"], ["--data", "nothing"], ["--no-such-flag"]])
def test_bad_input_is_said_once(line, tmp_path, change):
    children = together.shell([*line, *change], 2, tmp_path)
    assert ended(children) == [2, 2]
    (out, err), silent = said(tmp_path, 2)
    assert out == "" and err.lower().count("error") == 1 and silent == ["", ""]


def broken():
    """Let process 1 alone find an error in what it reads."""
    shapes = chain([(3, 32, 32)] * 2, repeat((1, 2, 3)))
    if os.environ["RANK"] == "1":
        loop.image_shape = lambda inputs: next(shapes)


def test_what_one_process_finds_wrong_the_first_one_says(line, tmp_path):
    children = together.shell([*line, "--stats", tmp_path / "s"], 2, tmp_path, broken)
    assert ended(children) == [2, 2]
    (out, err), silent = said(tmp_path, 2)
    assert out == "" and silent == ["", ""] and err.count("error") == 1
    assert "images of (1, 2, 3)" in err and "(process 1 of 2)" in err


def dying():
    """Save after every round; let process 1 be killed in its fourth."""
    resuming._ROUNDS, resuming._LEAST, resuming._SHARE = 1, 0.0, 1e9
    calls, call = [], loop.call

    def counted(*given):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given)

    loop.call = counted


def test_a_process_that_is_killed_ends_the_run_with_a_message_and_any_number_go_on(line, tmp_path):
    stats = tmp_path / "s"
    began = time.monotonic()
    children = together.shell([*line, "--stats", stats], 2, tmp_path, dying)
    assert ended(children) == [1, -signal.SIGKILL] and time.monotonic() - began < 60
    (out, err), _ = said(tmp_path, 2)
    assert out == "" and err.count("error: ") == 1 and "Traceback" not in err
    assert "another process of this run died" in err and f"is in {stats}, run the same command again" in err
    kept = Statistics.load(stats)
    assert kept.images == 24 and not kept.notes["complete"] and not (tmp_path / "small.safetensors").exists()
    close(
        calibrate(tiny(), data(tmp_path / "folder", 4), resume=stats), calibrate(tiny(), data(tmp_path / "folder", 4))
    )


@pytest.mark.slow
def test_torchrun_runs_it_and_its_end_by_a_killed_process_is_bounded(line, tmp_path):
    """The launcher itself: a whole run, and one of which a process dies."""
    script = tmp_path / "dying.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_processes\nfrom vitlr.cli import app\n"
        "if sys.argv.pop(1) == 'die': test_processes.dying()\n"
        "app.main()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given, stats = [*map(str, line), "--stats"], tmp_path / "s"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run([*launcher, script, "die", *given, stats], capture_output=True, env=env, timeout=200)
    told = done.stderr.decode()
    assert done.returncode == 1 and done.stdout == b"" and told.count("error: ") == 1, told[-3000:]
    assert time.monotonic() - began < 150
    assert not Statistics.load(stats).notes["complete"]
    done = subprocess.run([*launcher, "-m", "vitlr", *given, stats], capture_output=True, env=env, timeout=200)
    assert done.returncode == 0 and done.stdout.count(b"wrote ") == 1, done.stderr.decode()[-3000:]
    assert Statistics.load(stats).notes["complete"]
