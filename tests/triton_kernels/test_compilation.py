"""What the compiler says of a kernel for a GPU that is not there, and what of it is a problem.

All kernels are compiled once, by the gate (tests/bench/test_gpu_gate.py); here a toy kernel shows that it would notice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vitlr.triton_kernels import compilation
from vitlr.triton_kernels.compilation import Case, compile_case, where_taken
from vitlr.triton_kernels.targets import TARGETS, Unsupported

CASE = Case("nothing", None, {}, {}, 4, 1)


def test_what_breaks_its_bounds_is_told():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("toy_kernel.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name: "; ".join(problems) for name, problems in json.loads(done.stdout).items()}
    assert found["within"] == ""
    assert found["registers"].startswith("takes ") and found["registers"].endswith("registers, at most 16 are allowed")
    assert found["shared"].endswith("bytes of shared memory, its config says 1000")
    assert found["spill"].startswith("spills ")
    assert found["tensor cores"] == "does not use the tensor cores"
    assert found["memory"].endswith("bytes of shared memory, 1000 are there")
    assert found["argument"] == "square: no type or value for y"


def test_the_interpreter_does_not_compile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interpreter cannot compile"):
        compile_case(CASE, TARGETS["sm_90"])


def test_cases_that_are_not_taken_are_left_out():
    @where_taken
    def case(fits: bool) -> Case:
        if not fits:
            raise Unsupported("too large")
        return CASE

    assert [*case(True), *case(False)] == [CASE]


def test_an_assembler_that_serialises_wgmma_is_heard(monkeypatch):
    told = "ptxas info : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    for said, serialised in ((told, True), ("ptxas fatal : Unsupported .version 99.0", False)):
        done = subprocess.CompletedProcess([], 0, stdout="", stderr=said)
        monkeypatch.setattr(compilation, "subprocess", SimpleNamespace(run=lambda *args, done=done, **options: done))
        assert compilation._serialised("") is serialised
