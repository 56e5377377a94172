"""OpenVINO's own files: two, that belong together."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from vitlr.engines.export import difference, export
from vitlr.engines.running import OpenVino
from vitlr.errors import RunError

pytest.importorskip("openvino")


@torch.no_grad()
def test_its_two_files_answer_as_the_model_does(vit, many, tmp_path):
    done = export(vit, tmp_path / "vit.xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit.bin", "vit.xml"]
    assert list(done.differences) == ["openvino"]
    assert difference(OpenVino(tmp_path / "vit.xml", threads=1)(many), vit(many)) < 1e-5


@torch.no_grad()
def test_bytes_stay_bytes_in_its_files(vit, many, stats, tmp_path):
    done = export(vit, tmp_path / "int8.xml", bits=8, stats=stats, images=many[:4])
    assert done.int8 == {"openvino": 4}
    assert done.bytes < export(vit, tmp_path / "vit.xml").bytes


def test_a_file_that_is_none_is_refused_in_a_line(tmp_path):
    (tmp_path / "vit.xml").write_text("no model")
    with pytest.raises(RunError, match="openvino cannot open"):
        OpenVino(tmp_path / "vit.xml")


def test_models_may_be_dropped_in_any_order_and_signals_still_arrive(vit, tmp_path):
    # With a core for each model this ends with SIGSEGV, at the first signal that Python handles.
    export(vit, tmp_path / "vit.xml")
    program = """
import os, signal, sys
from pathlib import Path
from vitlr.engines.running import OpenVino
signal.signal(signal.SIGUSR1, lambda *_: print("told"))
first, second = OpenVino(Path(sys.argv[1])), OpenVino(Path(sys.argv[1]))
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""
    command = [sys.executable, "-c", program, tmp_path / "vit.xml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != -signal.SIGSEGV, "the stack for signals is gone"
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr
