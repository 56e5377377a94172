"""Autocast for ops registered with `Library.define`: the region's own dtype, eager and compiled alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an op computes on x: the autocast dtype in such a region (fp64 excepted), else x's own."""
    device = x.device.type
    if device in DEVICES and _casts(x) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _casts(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def register_autocast(lib: torch.library.Library, op: torch._ops.OpOverload) -> None:
    """Casts the tensors of `op` to the autocast dtype of the region, on CPU and CUDA.

    `torch.library.register_autocast` fixes the dtype when the op is registered; autocast(dtype=...) is the user's.
    """
    for device in DEVICES:
        key = getattr(torch._C.DispatchKey, "AutocastCPU" if device == "cpu" else "AutocastCUDA")
        _register(lib, op, device, key)


def _register(lib: torch.library.Library, op: torch._ops.OpOverload, device: str, key: Any) -> None:
    @op.py_impl(key)  # what the Python dispatcher calls while a graph is traced
    def cast(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        # The casts are recorded by autograd: its key lies below autocast's.
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*(arg.to(dtype) if _casts(arg) else arg for arg in args))

    lib.impl(op._schema.name.partition("::")[2], lambda _, *args: cast(*args), str(key).split(".")[1], with_keyset=True)
