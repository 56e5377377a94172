"""Calls the emulated kernel of emulated_fp8_first.cpp with tensors on the CPU."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_float, c_int, c_uint, c_void_p

import torch
from emulation import compiled

from vitlr.ops.layers.fp8_chain import FP8

NAN = 0x7F  # as a byte


class Matrices(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("W", "y")]


class Sizes(ctypes.Structure):
    _fields_ = [
        *((name, c_int) for name in ("M", "K", "r", "fp16")),
        *((name, c_void_p) for name in ("x", "gamma", "beta")),
        ("eps", c_float),
        *((name, c_void_p) for name in ("scale", "bias", "reach", "y_scale", "y_squares", "flags")),
        ("count", c_int),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The library with the types of what it is called with."""
    built = compiled("emulated_fp8_first")
    built.emulate.argtypes, built.emulate.restype = [c_void_p, c_void_p, c_int, c_uint, c_char_p, c_int], None
    return built


def emulate(x, step, processors, norm=(), eps=0.0, flags=None, seed=0):
    """Rows (q, scale, squares [M, 1]) of the next linear from x and the first step; outputs are NaN before."""
    (M, K), r = x.shape, len(step.codes)
    y = torch.full((M, r), NAN, dtype=torch.uint8)
    y_scale, y_squares = torch.full((M,), torch.nan), torch.full((M, 1), torch.nan)
    gamma, beta = norm or (None, None)
    pointers = [None if t is None else t.data_ptr() for t in (step.scale, step.bias, step.reach)]
    sizes = Sizes(
        M, K, r, x.dtype == torch.float16, *(None if t is None else t.data_ptr() for t in (x, gamma, beta)), eps,
        *pointers, y_scale.data_ptr(), y_squares.data_ptr(), None if flags is None else flags.data_ptr(),
        0 if flags is None else flags.numel(),
    )  # fmt: skip
    matrices = Matrices(step.codes.data_ptr(), y.data_ptr())
    told = ctypes.create_string_buffer(500)
    library().emulate(ctypes.byref(matrices), ctypes.byref(sizes), processors, seed, told, len(told))
    assert not told.value, told.value.decode()
    return y.view(FP8), y_scale, y_squares
