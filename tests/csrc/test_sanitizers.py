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
VNNI = [*AVX512, "-mavx512vnni"]
ISAS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx_vnni": ["-mavx2", "-mfma", "-mavxvnni"],
    "avx512": AVX512,
    "avx512_vnni": VNNI,
    "avx512_bf16": [*VNNI, "-mavx512bf16"],
    "amx_int8": [*VNNI, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}
OF_FLOATS = ("portable", "avx2", "avx512", "avx512_bf16")
OF_ATTENTION = (*OF_FLOATS, "amx_int8")


def run(command: list[str], **env: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rounds", "kernels"),
    [
        ("chain", 8, {"chain": OF_FLOATS}),
        ("rounding", 60, {"rounding": ()}),
        ("attention", 15, {"attention": OF_ATTENTION}),
        ("int8_chain", 15, {"chain": OF_FLOATS, "int8_chain": tuple(ISAS)}),
        (
            "int8_attention",
            12,
            {"int8_attention": (), "attention": OF_ATTENTION, "chain": OF_FLOATS, "int8_chain": tuple(ISAS)},
        ),
    ],
    ids=str,
)
def test_kernels_stay_within_their_buffers(tmp_path, name, rounds, kernels):
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("no C++ compiler, or not run from a source tree")
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    probe = [compiler, *FLAGS, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, cwd=ROOT, capture_output=True).returncode:
        pytest.skip(f"{compiler} has no sanitizers")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    objects, running = [], []
    for kernel, isas in kernels.items():
        for isa in isas if x86 else isas[:1]:
            objects.append(str(tmp_path / f"{kernel}_{isa}.o"))
            flags = [*FLAGS, *ISAS[isa], f"-DVITLR_ISA={isa}", "-c", f"csrc/cpu/{kernel}_kernel.cpp", "-o", objects[-1]]
            running.append(subprocess.Popen([compiler, *flags], cwd=ROOT))
    assert all(process.wait() == 0 for process in running)
    program = str(tmp_path / "check")
    sources = [f"tests/csrc/check_{name}.cpp", "csrc/cpu/isa.cpp", *(f"csrc/cpu/{kernel}.cpp" for kernel in kernels)]
    built = [f"-DVITLR_WITH_{isa.upper()}" for isa in list(kernels.values())[-1] if x86 or isa == "portable"]
    run([compiler, *FLAGS, *built, "-fopenmp", *sources, *objects, "-o", program])
    assert "checked up to" in run([program, str(rounds)])
