"""The layouts of csrc/cuda/tiles.h against CuTe's own functions, where CUTLASS' headers are (nvidia-cutlass)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def cutlass() -> Path | None:
    """CUTLASS' headers: CUTLASS_PATH (a checkout), or those of the package nvidia-cutlass."""
    spec = importlib.util.find_spec("cutlass_library")
    places = [Path(os.environ["CUTLASS_PATH"], "include")] if os.environ.get("CUTLASS_PATH") else []
    places += [Path(folder, "source", "include") for folder in (spec.submodule_search_locations or ())] if spec else []
    return next((place for place in places if (place / "cute" / "tensor.hpp").is_file()), None)


def cuda() -> list[str]:
    """Flags that find the headers of the CUDA toolkit."""
    homes = [
        os.environ.get("CUDA_HOME"),
        "/usr/local/cuda",
        *(str(Path(p).resolve().parents[1]) for p in [shutil.which("nvcc")] if p),
    ]
    for home in filter(None, homes):
        if Path(home, "include", "cuda_fp16.h").is_file():
            return [f"-I{home}/include", f"-I{home}/include/cccl"]
    return []


def test_layouts_are_those_of_cute(tmp_path):
    compiler, headers, toolkit = shutil.which(os.environ.get("CXX") or "g++"), cutlass(), cuda()
    if compiler is None or headers is None or not toolkit:
        pytest.skip(f"needs a C++ compiler ({compiler}), CUTLASS' headers ({headers}) and CUDA's ({toolkit or None})")
    program = str(tmp_path / "check_cute")
    command = [
        compiler,
        "-std=c++17",
        "-w",
        "-Icsrc",
        f"-I{headers}",
        *toolkit,
        "tests/csrc/check_cute.cpp",
        "-o",
        program,
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and ", 0 wrong" in done.stdout, done.stdout
