"""`cusolverDnXsyevBatched`, a candidate of `eigh`, through ctypes from the libcusolver that torch's own wheels bring.

Opened at run time: there is no link-time dependency, and whether a version has the call is asked of the library.
Signatures as in cusolverDn.h of CUDA 13 (64-bit API). Never ran on real hardware: the arguments are tested against a
library that is none.
"""

from __future__ import annotations

import ctypes
import glob
import os
import threading
from collections import deque
from ctypes import POINTER, byref, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.linalg.eigh import OP, BatchError

EIG_MODE_VECTOR, FILL_MODE_UPPER = 1, 1  # cusolver_common.h, cublas_api.h
DATA_TYPE = {torch.float32: 0, torch.float64: 1}  # CUDA_R_32F, CUDA_R_64F of library_types.h
LIMIT = 2**31  # n · lda · batch, as the documentation of the call says
STATUS = {
    1: "not initialized",
    2: "the library could not allocate memory; solve smaller batches",
    3: "an invalid value",
    4: "this architecture is not supported",
    6: "a kernel failed to launch or run",
    7: "an internal error; is enough device memory free?",
    9: "not supported for these sizes or types",
    31: "an invalid workspace",
}

# name: arguments after the handle; every call returns a status
_CALLS: dict[str, list[Any]] = {
    "cusolverDnCreate": [POINTER(c_void_p)],
    "cusolverDnSetStream": [c_void_p, c_void_p],
    "cusolverDnCreateParams": [POINTER(c_void_p)],
    "cusolverDnXsyevBatched_bufferSize": [
        c_void_p, c_void_p, c_int, c_int, c_int64,  # handle, params, jobz, uplo, n
        c_int, c_void_p, c_int64, c_int, c_void_p, c_int,  # type of A, A, lda, type of W, W, compute type
        POINTER(c_size_t), POINTER(c_size_t), c_int64,  # bytes on the device, on the host, batch
    ],
    "cusolverDnXsyevBatched": [
        c_void_p, c_void_p, c_int, c_int, c_int64,
        c_int, c_void_p, c_int64, c_int, c_void_p, c_int,
        c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_int64,  # buffers and their bytes, info, batch
    ],
}  # fmt: skip


def why_not(device: torch.device) -> str | None:
    """Why the call cannot run on a device, in one line; None where it can."""
    if device.type != "cuda":
        return f"K is on {device}, cuSOLVER runs on a CUDA device"
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    try:
        _library()
    except InputError as cause:
        return str(cause)
    return None


def objection(key: Any) -> str | None:
    """Why the call cannot run for a key of b matrices of size n, in one line; None where it can."""
    refusal = why_not(key.device)
    if refusal is None and key.n * key.n * key.b > LIMIT:
        refusal = f"{key.b} matrices of n = {key.n} are more than cuSOLVER takes at once: n · n · b up to 2^31"
    return refusal


def solve(K: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [b, n] ascending and vectors of K [b, n, n]; waits for the device, to ask whether all went well.

    Raises `BatchError` with the index of a matrix that did not converge.
    """
    energies, U, info = syev_batched(K)
    settle(K, info)
    return energies, U


def settle(K: Tensor, info: Tensor) -> None:
    """Wait for info [b] of K [b, n, n] and raise the `BatchError` of the first matrix where it is not 0."""
    failed = info.nonzero()[:, 0]
    if not len(failed):
        return
    index = int(failed[0])
    if not torch.isfinite(K[index]).all():
        raise BatchError("it holds NaN or Inf", index)
    raise BatchError(f"cuSOLVER did not converge (info {int(info[index])})", index)


def syev_batched(K: Tensor, *, overwrite: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues [b, n] ascending, vectors [b, n, n] and cuSOLVER's info [b] int32 of K [b, n, n], on K's stream.

    `overwrite`: K, if contiguous, becomes the memory of the vectors. Never waits for the device: info is not looked at.
    Raises InputError where `n · n · batch` is over the limit of the call, RuntimeError naming a status that is not
    success.
    """
    batch, n, _ = K.shape
    if n * n * batch > LIMIT:
        raise InputError(
            f"cusolverDnXsyevBatched takes n · n · batch up to 2^31, not {n} · {n} · {batch}; solve smaller batches"
        )
    # Overwritten with the vectors, column by column. Its upper triangle by columns is the lower one by rows.
    A = K.contiguous() if overwrite else K.clone(memory_format=torch.contiguous_format)
    W = torch.empty(batch, n, dtype=K.dtype, device=K.device)
    info = torch.zeros(batch, dtype=torch.int32, device=K.device)
    if batch == 0 or n == 0:
        return W, A, info
    library, kind = _library(), DATA_TYPE[K.dtype]
    with _on(K.device), _lock:
        handle, params = _handle(K.device)
        _check("cusolverDnSetStream", library.cusolverDnSetStream(handle, c_void_p(_stream(K.device))))
        on_device, on_host = c_size_t(), c_size_t()
        problem = (
            handle, params, EIG_MODE_VECTOR, FILL_MODE_UPPER, n,
            kind, c_void_p(A.data_ptr()), n, kind, c_void_p(W.data_ptr()), kind,
        )  # fmt: skip
        _check(
            "cusolverDnXsyevBatched_bufferSize",
            library.cusolverDnXsyevBatched_bufferSize(*problem, byref(on_device), byref(on_host), batch),
        )
        # torch's allocator keeps the workspace until the stream is past this call; the host's must outlive the call.
        workspace = torch.empty(on_device.value, dtype=torch.uint8, device=K.device)
        scratch = ctypes.create_string_buffer(max(on_host.value, 1))
        _check(
            "cusolverDnXsyevBatched",
            library.cusolverDnXsyevBatched(
                *problem,
                c_void_p(workspace.data_ptr()), on_device.value,
                ctypes.cast(scratch, c_void_p), on_host.value,
                c_void_p(info.data_ptr()), batch,
            ),
        )  # fmt: skip
        if on_host.value:
            _keep(scratch, K.device)
    return W, A.mT, info


_kept: deque[tuple[Any, Any]] = deque()  # (event, workspace of the host), oldest first
_captured: list[Any] = []


def _keep(scratch: Any, device: torch.device) -> None:
    """Hold the host's workspace until the stream is past the call: the header does not say when it is done with.

    Without waiting; and what a graph captured may be replayed at any time, so that is held for ever.
    """
    passed = _passed(device)
    if passed is None:
        _captured.append(scratch)
        return
    while _kept and _kept[0][0].query():
        _kept.popleft()
    _kept.append((passed, scratch))


_lock = threading.Lock()  # a handle serves one caller at a time
_handles: dict[torch.device, tuple[c_void_p, c_void_p]] = {}


def _handle(device: torch.device) -> tuple[c_void_p, c_void_p]:
    """Handle and parameters of a device, made once; they live as long as the process."""
    if device not in _handles:
        library, handle, params = _library(), c_void_p(), c_void_p()
        _check("cusolverDnCreate", library.cusolverDnCreate(byref(handle)))
        _check("cusolverDnCreateParams", library.cusolverDnCreateParams(byref(params)))
        _handles[device] = handle, params
    return _handles[device]


def _check(call: str, status: int) -> None:
    if status != 0:
        meaning = STATUS.get(status, "see CUSOLVER_STATUS in cusolver_common.h")
        raise RuntimeError(f"{call} returned status {status}: {meaning}; VITLR_EIGH=torch does without it")


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _passed(device: torch.device) -> Any:
    """An event at this point of the stream; None while a graph is captured, where it could not be asked."""
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device).record_event()


@cache
def _library() -> Any:
    """The library with the signatures set. Raises InputError where it is missing or too old for the call."""
    path = _path()
    try:
        library = ctypes.CDLL(path)
    except OSError as cause:
        raise InputError(f"{path} does not load: {cause}") from cause
    return declare(library, path)


def declare(library: Any, path: str) -> Any:
    """Sets the types of the calls. Raises InputError for a library that lacks one of them."""
    for name, types in _CALLS.items():
        try:
            call = getattr(library, name)
        except AttributeError as cause:
            raise InputError(f"{path} has no {name}; it comes with CUDA 12.6.2 and later") from cause
        call.argtypes, call.restype = types, c_int
    return library


def _path() -> str:
    """libcusolver of this torch's CUDA version: already loaded by torch, in its wheels, or known to the loader."""
    major = {"11": "11", "12": "11"}.get((torch.version.cuda or "").partition(".")[0], "12")  # CUDA 12 brings .so.11
    name = f"libcusolver.so.{major}"
    for root in (Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "nvidia"):
        found = sorted(glob.glob(os.path.join(root, "**", name), recursive=True))
        if found:
            return found[0]
    return name


registry.register(OP, registry.Candidate("cusolver", objection, solve))
