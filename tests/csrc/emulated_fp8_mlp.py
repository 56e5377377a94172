"""Calls the emulated kernel of emulated_fp8_mlp.cpp with tensors on the CPU."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_int, c_uint, c_void_p

import torch
from emulation import ACTS, compiled


class Matrices(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("q", "W1", "W2", "W3")]


class Sizes(ctypes.Structure):
    _fields_ = [
        *((name, c_int) for name in ("M", "r1", "D", "r2", "N", "act", "fp16", "parts")),
        *((name, c_void_p) for name in ("rows_scale", "squares", "reach")),
        *((name + str(i), c_void_p) for i in (1, 2, 3) for name in ("scale", "bias")),
        *((name, c_void_p) for name in ("residual", "y", "sums", "flags")),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The library with the types of what it is called with."""
    built = compiled("emulated_fp8_mlp")
    built.emulate.argtypes, built.emulate.restype = [c_void_p, c_void_p, c_int, c_uint, c_char_p, c_int], None
    built.ctas_of.argtypes, built.room_of_one.argtypes = [c_void_p, c_int], [c_void_p]
    return built


def room(M, r1, D, r2, N, processors):
    """CTAs of a launch, and what each of them may leave."""
    sizes = ctypes.byref(Sizes(M, r1, D, r2, N))
    return library().ctas_of(sizes, processors), library().room_of_one(sizes)


def address(t):
    return None if t is None else t.data_ptr()


def emulate(rows, steps, act, processors, residual=None, dtype=torch.bfloat16, seed=0):
    """y [M, N] of rows (q, scale, squares) and three steps; outputs and room for sums are NaN before."""
    q, scale, squares = rows
    (M, r1), D, r2, N = q.shape, *(len(step.codes) for step in steps)
    y = torch.full((M, N), torch.nan, dtype=dtype)
    vectors = [address(t) for step in steps for t in (step.scale, step.bias)]
    ctas, each = room(M, r1, D, r2, N, processors)
    sums, flags = torch.full((ctas, each), torch.nan), torch.zeros((ctas, 2), dtype=torch.int32)
    sizes = Sizes(
        M, r1, D, r2, N, ACTS.index(act), dtype == torch.float16, squares.shape[1],
        address(scale), address(squares), address(steps[0].reach), *vectors,
        address(residual), address(y), address(sums), address(flags),
    )  # fmt: skip
    matrices = Matrices(q.data_ptr(), *(step.codes.data_ptr() for step in steps))
    told = ctypes.create_string_buffer(500)
    library().emulate(ctypes.byref(matrices), ctypes.byref(sizes), processors, seed, told, len(told))
    assert not told.value, told.value.decode()
    return y
