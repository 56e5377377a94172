"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a program of their own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fno-math-errno",
    "-Icsrc",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
ISAS = {"portable": [], "avx2": ["-mavx2", "-mfma"], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}


def run(command: list[str], **env: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "rounds"), [("chain", 8), ("attention", 15)])
def test_kernels_stay_within_their_buffers(tmp_path, kernel, rounds):
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("no C++ compiler, or not run from a source tree")
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    probe = [compiler, *FLAGS, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, cwd=ROOT, capture_output=True).returncode:
        pytest.skip(f"{compiler} has no sanitizers")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = [isa for isa, flags in ISAS.items() if x86 or not flags]
    objects, running = [], []
    for isa in isas:
        objects.append(str(tmp_path / f"{isa}.o"))
        flags = [*FLAGS, *ISAS[isa], f"-DVITLR_ISA={isa}", "-c", f"csrc/cpu/{kernel}_kernel.cpp", "-o", objects[-1]]
        running.append(subprocess.Popen([compiler, *flags], cwd=ROOT))
    assert all(process.wait() == 0 for process in running)
    program = str(tmp_path / "check")
    sources = [f"tests/csrc/check_{kernel}.cpp", f"csrc/cpu/{kernel}.cpp", "csrc/cpu/isa.cpp"]
    built = [f"-DVITLR_WITH_{isa.upper()}" for isa in isas]
    run([compiler, *FLAGS, *built, "-fopenmp", *sources, *objects, "-o", program])
    assert "checked up to" in run([program, str(rounds)])
