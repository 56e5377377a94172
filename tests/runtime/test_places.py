"""Places are checked before any work, and what a killed process left is gone at the next run."""

import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from vitlr.errors import InputError
from vitlr.runtime.places import atomic_path, check_writable


def test_what_is_no_regular_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        (tmp_path / "link").symlink_to("/dev/null")
        (tmp_path / "nothing").symlink_to(tmp_path / "missing" / "file")
        for name in ("pipe", "socket", "link", "/dev/null", "nothing"):
            before = (tmp_path / name).lstat()
            with pytest.raises(InputError, match="cannot write"):
                check_writable(tmp_path / name)
            assert (tmp_path / name).lstat().st_ino == before.st_ino


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_names_that_no_file_can_have_are_refused(tmp_path, name):
    if name == "\ud800":
        check_writable(tmp_path / os.fsdecode(b"\xff"))  # bytes that are no UTF-8 are a name
    with pytest.raises(InputError, match="cannot write"):
        check_writable(tmp_path / name)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs flock")
@pytest.mark.parametrize("write", ["temporary.write_text('half')", "save_file({'x': zeros(2)}, temporary)"])
def test_what_a_killed_writer_left_goes_at_the_next_run_and_a_living_one_keeps_its_file(tmp_path, write):
    code = f"""
        import sys, time
        from safetensors.torch import save_file
        from torch import zeros
        from vitlr.runtime.places import atomic_path
        with atomic_path({str(tmp_path / "out")!r}) as temporary:
            {write}
            print(temporary, flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    dead, alive = (writer.stdout.readline().strip() for writer in writers)
    writers[0].send_signal(signal.SIGKILL)
    writers[0].wait()
    assert os.path.exists(dead) and os.path.exists(alive)
    (tmp_path / ".other.abc.part").write_text("of another file")
    with atomic_path(tmp_path / "out") as temporary:
        temporary.write_text("whole")
    assert not os.path.exists(dead) and os.path.exists(alive)
    writers[1].kill()
    writers[1].wait()
    check_writable(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.abc.part", "out"]
    assert (tmp_path / "out").read_text() == "whole"
