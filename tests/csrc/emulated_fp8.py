"""Calls the emulated kernel of emulated_fp8.cpp with tensors on the CPU."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_float, c_int, c_uint, c_void_p

import torch
from emulation import ACTS, compiled

from vitlr.ops.layers.fp8_chain import FP8

COLUMNS, ROWS = 128, 192  # of a tile of y
NAN = 0x7F  # as a byte


class Matrices(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("q", "W", "y")]


class Sizes(ctypes.Structure):
    _fields_ = [
        *((name, c_int) for name in ("M", "K", "N", "act", "parts")),
        *((name, c_void_p) for name in ("rows_scale", "squares", "scale", "bias", "reach", "y_scale", "y_squares")),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The library with the types of what it is called with."""
    built = compiled("emulated_fp8")
    built.emulate.argtypes = [c_void_p, c_void_p, c_int, c_uint, c_char_p, c_int]
    built.gelu_bytes.argtypes, built.gelu_bytes.restype = [c_float, c_void_p, c_void_p, c_int], c_float
    for name in ("bytes_of", "floats_of"):
        getattr(built, name).argtypes, getattr(built, name).restype = [c_void_p, c_void_p, c_int], None
    built.emulate.restype = None
    return built


def emulate(rows, step, act, ctas, seed=0):
    """Rows (q, scale, squares) of the next linear from those of this one; outputs are NaN before."""
    q, scale, squares = rows
    (M, K), N = q.shape, len(step.codes)
    y = torch.full((M, N), NAN, dtype=torch.uint8)
    y_scale, y_squares = torch.full((M,), torch.nan), torch.full((M, -(-N // COLUMNS)), torch.nan)
    pointers = [None if t is None else t.data_ptr() for t in (scale, squares, step.scale, step.bias, step.reach)]
    sizes = Sizes(M, K, N, ACTS.index(act), squares.shape[1], *pointers, y_scale.data_ptr(), y_squares.data_ptr())
    matrices = Matrices(q.data_ptr(), step.codes.data_ptr(), y.data_ptr())
    told = ctypes.create_string_buffer(500)
    library().emulate(ctypes.byref(matrices), ctypes.byref(sizes), ctas, seed, told, len(told))
    assert not told.value, told.value.decode()
    return y.view(FP8), y_scale, y_squares
