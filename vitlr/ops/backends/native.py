"""The only importer of the native extensions `vitlr._C` and `vitlr._cuda`: what was built, what runs, and why not.

They take raw pointers, so everything about a tensor is checked by the callers in this package.
"""

from __future__ import annotations

import importlib
import logging
import os
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

# torch first: it loads its own libgomp under the SONAME that the extension asks for, so both share one thread pool.
import torch

from vitlr.errors import InputError

_FAILURE = Path(__file__).parents[2] / "_build_failure.txt"  # written by setup.py
_CUDA_FAILURE = _FAILURE.with_name("_cuda_build_failure.txt")

_BINDINGS = Path(__file__).parents[3] / "csrc" / "bindings.cpp"  # there in a source tree only


def _outdated(extension: Any) -> str | None:
    """Why an extension does not belong to the sources that it lies in, as after a pull; None where it does."""
    if not _BINDINGS.is_file() or extension.build_info().get("bindings") == zlib.crc32(_BINDINGS.read_bytes()):
        return None
    return "vitlr._C is older than its sources: build it again, pip install -e . --no-build-isolation"


_C: Any = None
_import_error: ImportError | None = None
_old: str | None = None
try:
    _C = importlib.import_module("vitlr._C")
    if (_old := _outdated(_C)) is not None:
        logging.getLogger("vitlr").warning("%s; until then plain torch runs", _old)
        _C = None
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
    return _old or f"vitlr._C was built but does not load: {_import_error}"


def build_info() -> dict[str, Any]:
    """What was compiled and what is used: `compiler`, `isa_compiled`, `isa_used`, `isa_why`, `openmp`.

    Raises `InputError` if VITLR_CPU_ISA names an instruction set that was not built or does not run here.
    """
    if _C is None:
        return {"compiler": None, "isa_compiled": (), "isa_used": None, "openmp": False}
    return {**_C.build_info(), "isa_used": isa_used(), "isa_why": why_isa()}


def gram(C: torch.Tensor, X: torch.Tensor, weight: torch.Tensor | None) -> None:
    """C += Xᵀ diag(weight) X on the CPU: C [n, n] or its triangle, fp64, X [T, n], fp32, weight [T] ≥ 0, fp32."""
    assert _C is not None, why_not()
    pointer = 0 if weight is None else weight.data_ptr()
    layout = (*X.shape, *X.stride())
    _C.gram(C.data_ptr(), C.dim() == 1, X.data_ptr(), *layout, pointer, torch.get_num_threads(), isa_used())


def round_tile(
    W: torch.Tensor,
    step: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    sides: tuple[torch.Tensor, torch.Tensor],
    asked: tuple[torch.Tensor, torch.Tensor],
    found: Sequence[torch.Tensor],
) -> None:
    """Rounds one tile W [m, n] to steps [m, n], all in fp64 on the CPU, rows contiguous.

    bounds: the least and the largest codes [m, n]. sides: L of the outputs [m, m] and of the inputs [n, n] within the
    tile. asked: what lies to the right and below asks of it, [m, n] each, used up; the first contiguous. found: errors
    E, F, A and codes, written. step, the second of asked and found have the strides of W.
    """
    assert _C is not None, why_not()
    pointers = [X.data_ptr() for X in (W, step, *bounds, *sides, *asked, *found)]
    _C.round_tile(*W.shape, pointers, *(X.stride(0) for X in (W, *bounds, *sides)))


def pack(W: torch.Tensor, isa: str) -> torch.Tensor:
    """W [N, K] fp32 or bf16, any strides, in the order in which `chain` of an instruction set reads it."""
    assert _C is not None, why_not()
    bf16, (N, K) = W.dtype == torch.bfloat16, W.shape
    out = torch.empty(_C.packed_bytes(bf16, N, K, 0, isa), dtype=torch.uint8)
    _C.pack(bf16, W.data_ptr(), *W.stride(), N, K, out.data_ptr(), isa)
    return out


def pack_codes(
    codes: torch.Tensor, scale: torch.Tensor, K: int, group: int, form: int, isa: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of [N, K] (form 1: int8, 2: int4) and their scales, packed for `chain` like a weight in scale's dtype."""
    assert _C is not None, why_not()
    codes, scale = codes.contiguous(), scale.contiguous()
    bf16, (N, groups) = scale.dtype == torch.bfloat16, scale.shape
    out = torch.empty(_C.packed_bytes(bf16, N, K, form, isa), dtype=torch.uint8)
    scales = torch.empty(_C.packed_bytes(bf16, N, 1, 1, isa) * groups)
    pointers = (codes.data_ptr(), scale.data_ptr()), (out.data_ptr(), scales.data_ptr())
    _C.pack_codes(bf16, *pointers[0], N, K, group, form, *pointers[1], isa)
    return out, scales


def chain(x: torch.Tensor, layers: list[tuple], N: int, residual: torch.Tensor | None, isa: str) -> torch.Tensor:
    """x [M, K] through layers `act(input Wᵀ + first input Rᵀ + bias)`, the last N wide, + residual [M, N] -> [M, N].

    A layer is (W, R or None, pointer of a bias or 0, index of an activation), W and R the fields of packed weights:
    (pointer, pointer of scales or 0, N, K, group, form). x in any strides, residual with rows in one piece.
    """
    assert _C is not None, why_not()
    M, K = x.shape
    y = x.new_empty((M, N))
    more = (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
    bf16, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    _C.chain(bf16, x.data_ptr(), M, K, *x.stride(), y.data_ptr(), *more, layers, threads, isa)
    return y


def int8_pack(W: torch.Tensor, isa: str) -> torch.Tensor:
    """W [N, K] int8, any strides, in the order in which `int8_chain` of an instruction set reads it."""
    assert _C is not None, why_not()
    out = torch.empty(_C.int8_packed_bytes(*W.shape, isa), dtype=torch.uint8)
    _C.int8_pack(W.data_ptr(), *W.stride(), *W.shape, out.data_ptr(), isa)
    return out


NO_NORM = (0, 0, 0.0)


def int8_chain(
    x: torch.Tensor,
    layers: list[tuple],
    N: int,
    residual: torch.Tensor | None,
    isa: str,
    norm: tuple[int, int, float] = NO_NORM,
) -> torch.Tensor:
    """x [M, K] through layers of integers, the last N wide, + residual [M, N] -> [M, N].

    A layer is (pointer of packed codes, of scales, N, K, of a bias, index of an activation, pointers of multipliers and
    shifts, of the channels that its last columns read again or 0, how many). x in any strides, residual with rows in
    one piece. norm: pointers of gamma and beta in the dtype of x, eps. Raises InputError for channels that are not
    there.
    """
    assert _C is not None, why_not()
    M, K = x.shape
    y = x.new_empty((M, N))
    more = (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
    bf16, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    try:
        _C.int8_chain(bf16, x.data_ptr(), M, K, *x.stride(), y.data_ptr(), *more, layers, norm, threads, isa)
    except ValueError as cause:
        raise InputError(str(cause)) from cause
    return y


def int8_attention(
    x: torch.Tensor,
    heads: int,
    width: int,
    layers: tuple[list[tuple], ...],
    N: int,
    residual: torch.Tensor | None,
    isa: str,
    norm: tuple[int, int, float] = NO_NORM,
    starts: Sequence[int] = (),
) -> torch.Tensor:
    """x [B, L, K] contiguous through qkv, attention of so many heads and proj, + residual [B L, N] -> [B, L, N].

    Layers of both, norm and residual are as those of `int8_chain`. starts [heads + 1]: where queries, and keys, of
    every head begin among those of all and the last end, none wider than `width`; empty: all are `width` wide.
    """
    assert _C is not None, why_not()
    y = x.new_empty((*x.shape[:2], N))
    more = (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
    bf16, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    try:
        sizes = (*x.shape, heads, width)
        _C.int8_attention(bf16, x.data_ptr(), sizes, y.data_ptr(), *more, *layers, norm, starts, threads, isa)
    except ValueError as cause:
        raise InputError(str(cause)) from cause
    return y


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, isa: str) -> torch.Tensor:
    """softmax(q kᵀ / √d + bias) v: q [B, H, L, d], k and v [B, H, S, d], bias [B, H, L, S] -> [B, L, H, d].

    All are fp32 or all bf16, and their rows contiguous; other strides of the bias may be 0.
    """
    assert _C is not None, why_not()
    B, H, L, d = q.shape
    y = q.new_empty((B, L, H, d))
    places = ((0,) * 4 if x is None else (x.data_ptr(), *x.stride()[:3]) for x in (q, k, v, bias))
    sizes = (B, H, L, k.shape[2], d)
    bf16, threads = q.dtype == torch.bfloat16, torch.get_num_threads()
    _C.attention(bf16, *places, y.data_ptr(), *sizes, d**-0.5, threads, isa)
    return y


def fingerprint(W: torch.Tensor) -> int:
    """A hash of all entries of a CPU matrix W: any one that changes changes it."""
    assert _C is not None, why_not()
    return _C.fingerprint(W.data_ptr(), W.element_size(), *W.shape, *W.stride(), W.numel())


def peak(dtype: torch.dtype, repeats: int = 30) -> float:
    """FLOP/s of one core with nothing but multiply-adds between registers: the best of `repeats` runs of some ms.

    torch.int8: of u8 times s8 with sums in int32, in OP/s.
    """
    assert _C is not None, why_not()
    if dtype == torch.int8:
        return _C.int8_peak(repeats, isa_used())
    return _C.peak(dtype == torch.bfloat16, repeats, isa_used())


def why_isa() -> str:
    """Why `isa_used` is in use and no better one, in one line."""
    assert _C is not None, why_not()
    if os.environ.get("VITLR_CPU_ISA"):
        return "VITLR_CPU_ISA asks for it"
    built = list(_C.build_info()["isa_compiled"])  # each runs wherever the next one does
    better = built[built.index(best_isa()) + 1 :]
    return f"this CPU does not run {', '.join(better)}" if better else "the best that was built, and this CPU runs it"


def best_isa() -> str | None:
    """The best instruction set that was built and that this CPU runs, whatever VITLR_CPU_ISA says."""
    return None if _C is None else _C.select_isa("")


def isa_used() -> str:
    """The instruction set in use: VITLR_CPU_ISA, or the best one of this CPU. Raises InputError for one that is not."""
    try:
        return _C.select_isa(os.environ.get("VITLR_CPU_ISA", ""))
    except ValueError as cause:
        raise InputError(str(cause)) from cause


def cuda() -> Any:
    """The extension `vitlr._cuda`, imported when first asked for. Raises InputError where it is missing."""
    found = _load_cuda()
    if isinstance(found, str):
        raise InputError(found)
    return found


def cuda_why_not(device: torch.device | None = None) -> str | None:
    """Why `vitlr._cuda` cannot be used, or not on a device, in one line; None where it can."""
    found = _load_cuda()
    if isinstance(found, str):
        return found
    if device is None:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the tensors are on {device}, these kernels run on an NVIDIA GPU"
    try:
        capability(device)
    except RuntimeError as cause:  # no driver, or one that is older than the runtime that was linked in
        return str(cause)
    return None


def capability(device: torch.device) -> int:
    """80 for compute capability 8.0, 90 for 9.0. Raises RuntimeError that says what to do where there is no driver."""
    return cuda().capability(device_index(device))


def device_index(device: torch.device) -> int:
    """The number of a CUDA device; the current one where it has none."""
    return torch.cuda.current_device() if device.index is None else device.index


def cuda_build_info() -> dict[str, Any]:
    """What was compiled: `compiler`, `targets`, `runtime`; only `why_not` where nothing was."""
    found = _load_cuda()
    return {"why_not": found} if isinstance(found, str) else {**found.build_info(), "why_not": None}


def cuda_call(name: str, *args: Any, device: torch.device) -> Any:
    """A function of `vitlr._cuda` on the current stream of a device, which are its last two arguments.

    Raises InputError where it refuses its arguments, RuntimeError naming the CUDA status where a call fails.
    """
    stream = torch.cuda.current_stream(device).cuda_stream
    try:
        with torch.cuda.device(device):  # both runtimes, torch's and ours, then agree on the current device
            return getattr(cuda(), name)(*args, device_index(device), stream)
    except ValueError as cause:
        raise InputError(f"{name}: {cause}") from cause


@cache
def _load_cuda() -> Any:
    """The module, or why there is none."""
    try:
        return importlib.import_module("vitlr._cuda")
    except ModuleNotFoundError:
        told = _CUDA_FAILURE.read_text().strip() if _CUDA_FAILURE.is_file() else None
        return f"vitlr._cuda was not built: {told or 'VITLR_SKIP_NATIVE_BUILD=1, or run from a source tree'}"
    except ImportError as cause:
        return f"vitlr._cuda was built but does not load: {' '.join(str(cause).split())}"
