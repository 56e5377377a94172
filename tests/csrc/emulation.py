"""Compiles the emulations of Hopper kernels into libraries, each kept while nothing that it is made of changes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "csrc"
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-pthread"]
ACTS = ("none", "gelu", "gelu_tanh", "silu", "sigmoid", "relu")


def compiler() -> str | None:
    """A C++ compiler that knows _Float16, or None."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    probe = [found, *FLAGS, "-x", "c++", "-", "-o", os.devnull]
    done = found and subprocess.run(probe, input="_Float16 f(float x) { return x; }", text=True, capture_output=True)
    return found if done and done.returncode == 0 else None


@functools.cache
def compiled(name: str) -> ctypes.CDLL:
    """The library of tests/csrc/`name`.cpp."""
    found = compiler()
    assert found is not None
    source = HERE / f"{name}.cpp"
    files = [source, *sorted(HERE.glob("emulated_*.h")), *sorted((ROOT / "csrc" / "cuda").glob("*.h"))]
    key = hashlib.sha256("\0".join([found, *FLAGS]).encode())
    for file in files:
        key.update(file.read_bytes())
    kept = Path(tempfile.gettempdir()) / f"vitlr-emulated-{os.getuid()}" / f"{key.hexdigest()[:24]}.so"
    kept.parent.mkdir(mode=0o700, exist_ok=True)
    if not kept.is_file():
        fresh = kept.with_suffix(f".{os.getpid()}")
        command = [found, *FLAGS, "-Icsrc", "-Itests/csrc", str(source), "-o", str(fresh)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        fresh.replace(kept)
    return ctypes.CDLL(str(kept))
