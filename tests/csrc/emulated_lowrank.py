"""Calls the emulated kernels of emulated_lowrank.cpp with tensors on the CPU."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_bool, c_char_p, c_double, c_int, c_int64, c_uint, c_uint64, c_void_p

import torch
from emulation import ACTS, compiled, compiler

__all__ = ["ACTS", "activations", "compiler", "emulate", "library", "planned"]


class Matrix(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class Params(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("x", "B1", "A1", "B2", "A2", "residual")),
        *((name, c_void_p) for name in ("b1", "b2", "y")),
        *((name, c_int) for name in ("M", "K", "D", "N", "r1", "r2", "act")),
        ("fp16", c_bool),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The library with the types of what it is called with."""
    built = compiled("emulated_lowrank")
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
