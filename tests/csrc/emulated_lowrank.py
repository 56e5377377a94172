"""Builds the emulated kernels of emulated_lowrank.cpp and calls them with tensors on the CPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import c_bool, c_char_p, c_double, c_int, c_int64, c_uint, c_uint64, c_void_p
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "csrc" / "emulated_lowrank.cpp"
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-pthread"]
ACTS = ("none", "gelu", "gelu_tanh", "silu", "sigmoid", "relu")


class Matrix(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class Params(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("x", "B1", "A1", "B2", "A2", "residual")),
        *((name, c_void_p) for name in ("b1", "b2", "y")),
        *((name, c_int) for name in ("M", "K", "D", "N", "r1", "r2", "act")),
        ("fp16", c_bool),
    ]


def compiler() -> str | None:
    """A C++ compiler that knows _Float16, or None."""
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    probe = [found, *FLAGS, "-x", "c++", "-", "-o", os.devnull]
    done = found and subprocess.run(probe, input="_Float16 f(float x) { return x; }", text=True, capture_output=True)
    return found if done and done.returncode == 0 else None


@functools.cache
def library() -> ctypes.CDLL:
    """The library, kept between runs while nothing that it is made of changes."""
    found = compiler()
    assert found is not None
    files = [SOURCE, *sorted(SOURCE.parent.glob("emulated_*.h")), *sorted((ROOT / "csrc" / "cuda").glob("*.h"))]
    key = hashlib.sha256("\0".join([found, *FLAGS]).encode())
    for file in files:
        key.update(file.read_bytes())
    kept = Path(tempfile.gettempdir()) / f"vitlr-emulated-{os.getuid()}" / f"{key.hexdigest()[:24]}.so"
    kept.parent.mkdir(mode=0o700, exist_ok=True)
    if not kept.is_file():
        fresh = kept.with_suffix(f".{os.getpid()}")
        command = [found, *FLAGS, "-Icsrc", "-Itests/csrc", str(SOURCE), "-o", str(fresh)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        fresh.replace(kept)
    built = ctypes.CDLL(str(kept))
    built.emulate.argtypes = [c_void_p, c_void_p, c_void_p, c_uint, c_char_p, c_int]
    built.activations.argtypes = [c_int, c_bool, c_void_p, c_void_p, c_int64]
    built.emulate.restype = built.activations.restype = None
    built.bounded_wait.argtypes, built.bounded_wait.restype = [c_int, c_uint64, c_uint64], c_int
    return built


def params(x, B1, A1, b1, B2, A2, b2, residual, act, y) -> Params:
    """The arguments of lowrank_mlp; of lowrank_linear B as B1, A as A2, and neither A1 nor B2."""

    def matrix(tensor):
        return Matrix() if tensor is None else Matrix(tensor.data_ptr(), tensor.stride(0))

    def pointer(tensor):
        return None if tensor is None else tensor.data_ptr()

    sizes = (len(x), x.shape[1], 0 if A1 is None else len(A1), len(A2), len(B1), A2.shape[1], ACTS.index(act))
    matrices = map(matrix, (x, B1, A1, B2, A2, residual))
    return Params(*matrices, *map(pointer, (b1, b2, y)), *sizes, x.dtype == torch.float16)


def emulate(args, plan, seed=0):
    """y of (x, B1, A1, b1, B2, A2, b2, residual, act) by a plan (R, warpgroups, CTAs a cluster, clusters, groups)."""
    y = torch.full((len(args[0]), len(args[5])), torch.nan, dtype=args[0].dtype)
    told = ctypes.create_string_buffer(500)
    given = params(*args, y)
    library().emulate(ctypes.byref(given), (c_int * 5)(*plan), ctypes.byref(c_double()), seed, told, len(told))
    assert not told.value, told.value.decode()
    return y


def planned(M, K, D, N, r1, r2, processors=132, residual=False):
    """The plan of a shape and its modelled time: ((R, warpgroups, ranks, clusters, groups), µs)."""
    given = Params(M=M, K=K, D=D, N=N, r1=r1, r2=r2)
    if residual:
        given.residual.data = 1
    values, time = (c_int * 5)(0, processors), c_double()
    library().emulate(ctypes.byref(given), values, ctypes.byref(time), 0, ctypes.create_string_buffer(1), 1)
    return tuple(values), time.value


def activations(act, dtype, x):
    """The activation of fp32 values as the kernels compute it before they round to dtype."""
    y = torch.empty_like(x)
    library().activations(ACTS.index(act), dtype == torch.float16, x.data_ptr(), y.data_ptr(), x.numel())
    return y
