"""The barriers of the CUDA solve under ThreadSanitizer: a host thread for each of the GPU's (check_solve_races.cpp)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    if compiler is None or not (ROOT / "csrc" / "cuda").is_dir():
        pytest.skip("no C++ compiler, or not run from a source tree")
    folder = tmp_path_factory.mktemp("races")
    flags = ["-std=c++17", "-O1", "-g1", "-pthread", "-fsanitize=thread", "-Wno-unknown-pragmas", "-Icsrc"]
    (folder / "empty.cpp").write_text("int main() {}\n")
    probe = subprocess.run([compiler, *flags, folder / "empty.cpp", "-o", folder / "probe"], cwd=ROOT)
    if probe.returncode or subprocess.run([folder / "probe"], capture_output=True).returncode:
        pytest.skip(f"{compiler} has no ThreadSanitizer that runs here")
    built = [compiler, *flags, "tests/csrc/check_solve_races.cpp", "-o", str(folder / "races")]
    subprocess.run(built, cwd=ROOT, check=True)
    return folder / "races"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program, *arguments], env=options, capture_output=True, text=True, timeout=300)


def test_the_kernels_have_no_race_in_shared_memory(program):
    done = run(program)
    assert done.returncode == 0 and done.stdout == "right\n", done.stderr[-3000:]


@pytest.mark.parametrize("barrier", ["product 0", "product 3", "factor 1", "factor 2", "factor 3", "factor 4"])
def test_a_barrier_left_out_is_found(program, barrier):
    done = run(program, *barrier.split())
    assert done.returncode != 0 and "data race" in done.stderr
