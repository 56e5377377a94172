"""The kernels of csrc/cuda's solve on the host: the same functions, thread by thread (tests/csrc/emulate_solve.cpp)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


@cache
def library() -> Any:
    """Compiled once a process; skips where there is no compiler or no source tree."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    if compiler is None or not (ROOT / "csrc" / "cuda").is_dir():
        pytest.skip("no C++ compiler, or not run from a source tree")
    target = Path(mkdtemp(prefix="vitlr_emulation_")) / "emulate_solve.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Icsrc"]
    command = [compiler, *flags, "tests/csrc/emulate_solve.cpp", "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    loaded = ctypes.CDLL(str(target))
    loaded.coverage.restype = ctypes.c_double
    return loaded


def numbers(*arguments: Any) -> ctypes.Array[ctypes.c_int64]:
    """The arguments of a binding, tuples flattened."""
    flat = [int(x) for a in arguments for x in (a if isinstance(a, tuple) else (a,))]
    return (ctypes.c_int64 * len(flat))(*flat)


def fields(A: torch.Tensor) -> tuple[int, ...]:
    """Address and strides of a batch of matrices."""
    return (A.data_ptr(), *A.stride())


def call(
    name: str, *arguments: Any, device: torch.device | None = None, wide: bool | None = None, mode: int = 0
) -> None:
    """As `_native.cuda_call`, on CPU tensors. mode 1: copies as late as possible; 2: threads backwards; 3: both."""
    given = numbers(*arguments)
    if name == "weighted_chain":
        chosen = library().prefers_wide(given, ctypes.c_int64(132)) if wide is None else wide
        library().weighted_chain(given, int(chosen), mode)
    else:
        getattr(library(), name)(given, mode)
