"""What compilers make of the loops of products: every sum stays in a register, or the kernel runs at half its speed.

The answers are the same either way, so no other test would notice.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-Icsrc"]  # as in setup.py
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
BF16 = [*AVX512, "-mavx512vnni", "-mavx512bf16"]
# kernel, instruction set, its flags, the type and the rows of a tile, what multiplies
CASES = [
    ("int8_chain", "avx2", ["-mavx2", "-mfma"], "Int8", 6, "vpmaddwd"),
    ("int8_chain", "avx_vnni", ["-mavx2", "-mfma", "-mavxvnni"], "Int8", 6, "vpdpbusd"),
    ("int8_chain", "avx512", AVX512, "Int8", 12, "vpmaddwd"),
    ("int8_chain", "avx512_vnni", [*AVX512, "-mavx512vnni"], "Int8", 12, "vpdpbusd"),
    ("int8_chain", "avx512_bf16", BF16, "Int8", 12, "vpdpbusd"),
    ("chain", "avx2", ["-mavx2", "-mfma"], "Fp32", 6, "vfmadd231ps"),
    ("chain", "avx512", AVX512, "Fp32", 12, "vfmadd231ps"),
    ("chain", "avx512_bf16", BF16, "Bf16", 12, "vdpbf16ps"),
]
COMPILER = shutil.which("g++")


def function(assembly: str, pattern: str) -> list[str]:
    """The lines of the function whose mangled name matches."""
    found = re.search(rf"^(_Z\w*{pattern}\w*):\n(.*?)^\t\.cfi_endproc", assembly, re.S | re.M)
    assert found, f"no function {pattern}"
    return found[2].splitlines()


def innermost(lines: list[str], instruction: str) -> list[str]:
    """The shortest loop that holds the instruction: from a label to a jump back to it."""
    labels, loops = {}, []
    for at, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = at
        jump = re.match(r"\tj\w+\t(\.L\w+)", line)
        if jump and jump[1] in labels and any(instruction in part for part in lines[labels[jump[1]] : at]):
            loops.append(lines[labels[jump[1]] : at])
    assert loops, f"no loop multiplies by {instruction}"
    return min(loops, key=len)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the assembly of x86-64")
@pytest.mark.skipif(COMPILER is None, reason="no g++")
@pytest.mark.parametrize(
    ("kernel", "isa", "flags", "kind", "rows", "multiplies"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES]
)
def test_sums_stay_in_registers(kernel, isa, flags, kind, rows, multiplies):
    source = f"csrc/cpu/{kernel}_kernel.cpp"
    command = [COMPILER, *FLAGS, *flags, f"-DVITLR_ISA={isa}", "-S", source, "-o", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "unrecognized command-line option" in done.stderr:
        pytest.skip(f"this compiler knows no {isa}")
    assert done.returncode == 0, done.stderr[-2000:]
    tile = innermost(function(done.stdout, rf"tileINS0_\d{kind}ELi{rows}ELi2E"), multiplies)
    assert sum(multiplies in line for line in tile) == 2 * rows
    for name, loop in (
        ("tile", tile),
        ("peak", innermost(function(done.stdout, rf"peak_ofINS0_\d{kind}E"), multiplies)),
    ):
        stores = [line for line in loop if re.match(r"\tv\S+\t.*%[xyz]mm\d+, [^%]*\(%", line)]
        assert not stores, f"{name} writes sums to memory in every step: {stores[:2]}"


def test_a_loop_that_keeps_its_sums_in_memory_is_seen():
    lines = [".L1:", "\tvpdpbusd\t%zmm0, %zmm1, %zmm2", "\tvmovaps\t%zmm2, 968(%rsp)", "\tjne\t.L1"]
    assert any(re.match(r"\tv\S+\t.*%[xyz]mm\d+, [^%]*\(%", line) for line in innermost(lines, "vpdpbusd"))
