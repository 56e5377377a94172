"""Long commands killed at random moments leave whole files or none, and the next run comes to the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from commandline import nothing_left

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals")]
REFINE = ["--refine", "refit"]


def start(arguments, **how):
    command = [sys.executable, "-m", "vitlr.cli.app", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, **how)


@pytest.fixture
def line(squeeze, tmp_path, image_folder):
    """The arguments of a run with statistics and snapshots, on images enough to refine."""
    data = image_folder(images=8, name="more")
    return squeeze(*REFINE, data=data, stats=tmp_path / "s", resume=tmp_path / "snapshots", workers=0)


@pytest.fixture
def results(tmp_path):
    def read():
        from vitlr.checkpoint import files

        model = files.load(tmp_path / "small.safetensors")
        return (tmp_path / "s").read_bytes(), {name: t.clone() for name, t in model.state_dict().items()}

    return read


def clear(tmp_path):
    for path in [tmp_path / "small.safetensors", tmp_path / "s", *(tmp_path / "snapshots").glob("*")]:
        path.unlink(missing_ok=True)


def test_kill_9_at_random_moments_leaves_no_partial_file_and_runs_go_on_to_the_same_tensors(line, results, tmp_path):
    began = time.monotonic()
    assert start(line).wait() == 0
    whole, expected = time.monotonic() - began, results()
    rng = random.Random(8)
    for _ in range(2):
        clear(tmp_path)
        for _ in range(2):  # the second run begins with what the first one left
            child = start(line)
            time.sleep(whole * rng.uniform(0.4, 1.0))
            child.kill()
            child.communicate()
            if (tmp_path / "small.safetensors").exists():
                results()  # whole, as it is read
        assert start(line).wait() == 0
        stats, state = results()
        assert stats == expected[0] and state.keys() == expected[1].keys()
        assert all((state[name] == expected[1][name]).all() for name in state)
        assert not list(tmp_path.glob(".*.part")) and not list((tmp_path / "snapshots").glob(".*.part"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_at_any_moment_end_with_130(line, tmp_path, number):
    began = time.monotonic()
    assert start(["--version"]).wait() == 0
    loaded = time.monotonic() - began  # until then Python starts, and an interrupt is its own
    assert start(line).wait() == 0
    whole = time.monotonic() - began - loaded
    for share in (max(0.1, 3 * loaded / whole), 0.5, 0.8):
        clear(tmp_path)
        child = start(line, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        time.sleep(share * whole)
        child.send_signal(number)
        _, said = child.communicate()
        assert child.returncode in (0, 130), (share, child.returncode, said.decode()[-500:])
        assert child.returncode == 130 or share > 0.6, "it was swallowed"
        if child.returncode == 130:
            assert b"Traceback" not in said
            assert nothing_left(tmp_path, "small.safetensors")


def test_a_reader_that_goes_away_is_no_fault(line):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vitlr.cli.app", *map(str, line), "--json"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(write)
    assert b"Traceback" not in done.stderr and done.returncode in (0, 1), done.stderr[-500:]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes anywhere")
def test_folders_that_cannot_be_written_are_refused(refused, squeeze, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    for flag in ("out", "stats", "plan_out"):
        assert "cannot write" in refused(*squeeze(**{flag: locked / "file"}))


def test_three_processes_on_one_file_of_statistics_all_end_well(squeeze, tmp_path):
    lines = [squeeze("--json", stats=tmp_path / "s", out=tmp_path / f"{i}.safetensors", workers=0) for i in range(3)]
    children = [start(line) for line in lines]
    answers = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], [said.decode()[-300:] for _, said in answers]
    kept = [json.loads(out)["params_kept"] for out, _ in answers]
    assert len(set(kept)) == 1 and not list(tmp_path.glob(".*.part"))


def test_an_interrupt_within_an_exec_of_a_string_ends_with_130_too(tmp_path):
    (tmp_path / "interrupted.py").write_text(
        "import vitlr.cli.app as shell\nshell.app = lambda: exec('raise KeyboardInterrupt')\nshell.main()\n"
    )
    done = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, stderr=subprocess.PIPE)
    assert done.returncode == 130 and b"interrupted" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_other_code_swallows_is_raised_again(tmp_path, number):
    (tmp_path / "swallowing.py").write_text(
        "import os, signal, sys, time\n"
        "import vitlr.cli.app as shell\n"
        "def swallow():\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "        time.sleep(30)\n"
        "    except BaseException:\n"
        "        pass\n"
        "    try:\n"
        "        time.sleep(30)\n"
        "    finally:  # what cleans up is left to end, however long it takes\n"
        "        time.sleep(1.5)\n"
        "        print('cleaned', file=sys.stderr)\n"
        "shell.app = swallow\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "shell.main()\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "swallowing"], cwd=tmp_path, stderr=subprocess.PIPE)
    assert done.returncode == 130 and time.monotonic() - began < 25
    assert b"cleaned" in done.stderr and b"interrupted" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("failing", ["ImportError('half an import')", "InputError('no torch')"])
def test_what_fails_after_a_swallowed_interrupt_ends_as_the_interrupt(tmp_path, number, failing):
    (tmp_path / "broken.py").write_text(
        "import os, signal, sys\n"
        "import vitlr.cli.app as shell\n"
        "import vitlr.cli.commands.doctor as doctor\n"
        "from vitlr.errors import InputError\n"
        "def swallow():\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "    except BaseException:\n"
        "        pass\n"
        f"    raise {failing}\n"
        "doctor.diagnose = swallow\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv[1:] = ['doctor']\n"
        "shell.main()\n"
    )
    done = subprocess.run([sys.executable, "-m", "broken"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: interrupted; it came to {failing[:8]}")
