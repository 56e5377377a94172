"""The only importer of the native extension `vitlr._C`: what was built, what runs, and why not.

The extension takes raw pointers, so everything about a tensor is checked by the callers in this package.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

# torch first: it loads its own libgomp under the SONAME that the extension asks for, so both share one thread pool.
import torch

from vitlr.errors import InputError

_FAILURE = Path(__file__).parent.parent / "_build_failure.txt"  # written by setup.py

_C: Any = None
_import_error: ImportError | None = None
try:
    _C = importlib.import_module("vitlr._C")
except ImportError as cause:
    _import_error = cause


def available() -> bool:
    """Whether the native extension is there and loads."""
    return _C is not None


def why_not() -> str | None:
    """Why the native extension is not used, in one line; None where it is."""
    if available():
        return None
    if _FAILURE.is_file():
        return f"vitlr._C was not built: {_FAILURE.read_text().strip()}"
    if isinstance(_import_error, ModuleNotFoundError):
        return "vitlr._C was not built (VITLR_SKIP_NATIVE_BUILD=1, or run from a source tree without an install)"
    return f"vitlr._C was built but does not load: {_import_error}"


def build_info() -> dict[str, Any]:
    """What was compiled and what is used: `compiler`, `isa_compiled`, `isa_used`, `openmp`, `cuda`.

    Raises `InputError` if VITLR_CPU_ISA names an instruction set that was not built or does not run here.
    """
    if _C is None:
        reason = why_not()
        return {"compiler": None, "isa_compiled": (), "isa_used": None, "openmp": False, "cuda": f"not built: {reason}"}
    return {**_C.build_info(), "isa_used": _isa()}


def gram(C: torch.Tensor, X: torch.Tensor, weight: torch.Tensor | None) -> None:
    """C += Xᵀ diag(weight) X on the CPU: C [n, n] fp64 contiguous, X [T, n] fp32, weight [T] fp32 contiguous ≥ 0."""
    assert _C is not None, why_not()
    pointer = 0 if weight is None else weight.data_ptr()
    _C.gram(C.data_ptr(), X.data_ptr(), *X.shape, *X.stride(), pointer, torch.get_num_threads(), _isa())


def best_isa() -> str | None:
    """The best instruction set that was built and that this CPU runs, whatever VITLR_CPU_ISA says."""
    return None if _C is None else _C.select_isa("")


def _isa() -> str:
    """The instruction set in use: VITLR_CPU_ISA, or the best one of this CPU."""
    try:
        return _C.select_isa(os.environ.get("VITLR_CPU_ISA", ""))
    except ValueError as cause:
        raise InputError(str(cause)) from cause
