"""`vitlr doctor`: tells what is there, and still tells where something is missing."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from typer.testing import CliRunner

from vitlr.cli.app import app
from vitlr.cli.commands import doctor
from vitlr.ops import Candidate, register, unregister
from vitlr.ops.backends import native
from vitlr.ops.dispatch import registry


@pytest.fixture
def found():
    return doctor.diagnose()


def test_tells_versions_threads_and_devices(found):
    assert found["packages"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["devices"][0]["name"] == "cpu"
    text = doctor.render(found)
    assert f"timm         {found['packages']['timm']}" in text and "lowrank_mlp" in text


def test_json_is_one_line():
    answer = CliRunner().invoke(app, ["doctor", "--json"])
    assert answer.exit_code == 0 and answer.stdout.count("\n") == 1
    assert {op["op"] for op in json.loads(answer.stdout)["ops"]} == set(registry._ops), "an op is not shown"


def test_names_the_candidate_that_runs_and_why_others_do_not():
    register("lowrank_linear", Candidate("cpu.never", lambda key: "K is not a prime", lambda *a: a[0]))
    try:
        found = doctor.diagnose()
    finally:
        unregister("lowrank_linear", "cpu.never")
    op = next(op for op in found["ops"] if op["op"] == "lowrank_linear")
    assert op["chosen"] in ("torch", "cpu")
    assert {"candidate": "cpu.never", "runs": False, "why": "K is not a prime", "ran_on": []} in op["candidates"]
    assert "K is not a prime" in doctor.render(found)


def test_works_without_the_extension(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_import_error", ModuleNotFoundError("no _C"))
    found = doctor.diagnose()
    assert not found["native"]["available"] and "vitlr._C was" in found["native"]["why_not"]
    gram = next(op for op in found["ops"] if op["op"] == "gram_update_")
    assert gram["chosen"] == "torch" and "vitlr._C was" in doctor.render(found)


def test_tells_what_of_cuda_was_built_and_that_it_never_ran(monkeypatch):
    built = {"compiler": "nvcc 13.0.88, g++", "targets": "sm_80, PTX 80; sm_90a", "runtime": 13000, "why_not": None}
    monkeypatch.setattr(native, "cuda_build_info", lambda: built)
    monkeypatch.setattr(native, "cuda_why_not", lambda device=None: "no usable CUDA driver")
    found = doctor.diagnose()
    assert found["cuda"]["built"] and found["cuda"]["why_not"] == "no usable CUDA driver"
    text = doctor.render(found)
    assert "cuda         built with nvcc 13.0.88, g++ for sm_80, PTX 80; sm_90a" in text
    assert re.search(r"compiled, not run on a GPU: .*cuda\.tensor_cores", text) and "no usable CUDA driver" in text


def test_tells_why_there_is_no_cuda_part(monkeypatch):
    monkeypatch.setattr(native, "_load_cuda", lambda: "vitlr._cuda was not built: BuildError: no nvcc")
    found = doctor.diagnose()
    assert not found["cuda"]["built"]
    assert "cuda         vitlr._cuda was not built: BuildError: no nvcc" in doctor.render(found)


def test_works_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    found = doctor.diagnose()
    assert not found["triton"]["runs"] and "does not import" in found["triton"]["why_not"]
    assert "triton runs  no: it does not import" in doctor.render(found)


@pytest.mark.parametrize(("name", "value"), [("VITLR_BACKEND", "abacus"), ("VITLR_CPU_ISA", "mmx")])
def test_a_variable_that_cannot_be_obeyed_is_told_not_raised(monkeypatch, name, value):
    if name == "VITLR_CPU_ISA" and not native.available():
        pytest.skip("the extension is not built")
    monkeypatch.setenv(name, value)
    answer = CliRunner().invoke(app, ["doctor"])
    assert (
        answer.exit_code == 0 and f"{name}={value}" in answer.stdout and value in answer.stdout.replace(f"{name}=", "")
    )
    json_answer = CliRunner().invoke(app, ["doctor", "--json"])
    told = json.loads(json_answer.stdout)
    problems = [op["problem"] for op in told["ops"] if op["problem"]] + [told["native"]["why_not"] or ""]
    assert any(value in problem for problem in problems)


def test_kernels_are_one_line_unless_they_are_asked_for(found):
    short = CliRunner().invoke(app, ["doctor"]).stdout
    assert all(len(line) <= 80 for line in short.splitlines()) and "would run" not in short
    assert re.search(r"^kernels      on cpu: \d+ by ", short, re.MULTILINE) and "--kernels" in short
    asked = CliRunner().invoke(app, ["doctor", "--kernels"]).stdout
    assert "would run" in asked and "lowrank_mlp" in asked and "--kernels" not in asked
    assert sum(map(int, re.findall(r"(\d+) by ", short))) == len(found["ops"])
