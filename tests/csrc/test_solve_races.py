"""What compute-sanitizer's racecheck and memcheck would see of the CUDA solve, on the host (check_solve_races.cpp).

One host thread for each of the GPU's, with real barriers, under ThreadSanitizer; the same under AddressSanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Callable[[str], Path]:
    """A function that builds the program under sanitizers, once for each."""
    built: dict[str, Path] = {}

    def build(sanitizers: str) -> Path:
        if sanitizers not in built:
            built[sanitizers] = _build(sanitizers, tmp_path_factory.mktemp(sanitizers.partition(",")[0]))
        return built[sanitizers]

    return build


def _build(sanitizers: str, folder: Path) -> Path:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    if compiler is None or not (ROOT / "csrc" / "cuda").is_dir():
        pytest.skip("no C++ compiler, or not run from a source tree")
    flags = ["-std=c++17", "-O1", "-g1", "-pthread", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-Icsrc"]
    (folder / "empty.cpp").write_text("int main() {}\n")
    probe = subprocess.run([compiler, *flags, folder / "empty.cpp", "-o", folder / "probe"], cwd=ROOT)
    if probe.returncode or subprocess.run([folder / "probe"], capture_output=True).returncode:
        pytest.skip(f"{compiler} has no {sanitizers} sanitizer that runs here")
    source = "tests/csrc/check_solve_races.cpp"
    subprocess.run(
        [compiler, *flags, "-Wno-unknown-pragmas", source, "-o", str(folder / "races")], cwd=ROOT, check=True
    )
    return folder / "races"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program, *arguments], env=options, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_the_kernels_have_no_race_and_stay_within_their_buffers(program, sanitizers):
    done = run(program(sanitizers))
    assert done.returncode == 0 and done.stdout == "right\n", done.stderr[-3000:]


@pytest.mark.parametrize("barrier", ["product 0", "product 3", "factor 1", "factor 2", "factor 3", "factor 4"])
def test_a_barrier_left_out_is_found(program, barrier):
    done = run(program("thread"), *barrier.split())
    assert done.returncode != 0 and "data race" in done.stderr
