"""The GPU gate, as far as it goes without a GPU: what compiles must stay within its bounds, and the script must run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

GATE = Path(__file__).resolve().parents[2] / "bench" / "gpu_gate.py"


def gate(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "VITLR_BACKEND")}
    command = [sys.executable, str(GATE), *flags]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_every_kernel_compiles_within_its_bounds_and_is_right_in_the_interpreter(tmp_path):
    done = gate("--compile-only", "--json", str(tmp_path / "gate.json"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "gate.json").read_text())
    assert not report["failures"] and "green" in done.stdout
    modules = {row["module"] for row in report["compiled"]}
    assert {"gram", "lowrank_linear", "lowrank_mlp", "lowrank_residual_linear", "weighted_gram_chain"} <= modules
    assert {row["target"] for row in report["compiled"]} == {"sm_80", "sm_90", "gfx942"}
    assert all(row["bound"] for row in report["compiled"] if row["target"] != "gfx942"), "a case without a bound"


@pytest.mark.slow
def test_the_steps_on_a_gpu_can_be_rehearsed_without_one(tmp_path):
    done = gate("--rehearse", "--json", str(tmp_path / "gate.json"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "gate.json").read_text())
    assert any("triton" in name for row in report["timings"] for name in row["us"])
    assert {row["mode"] for row in report["models"]} == {"eager", "graph", "compiled"}
    assert {row["model"] for row in report["models"]} == {"dense", "two GEMMs", "fused"}
    assert all(row["excess"] < 1e-3 for row in report["solve"])
    assert not report["not_timed"]
