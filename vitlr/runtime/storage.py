"""Files that are whole or not there: atomic writing, and safetensors with one JSON header, read defensively."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitlr.errors import InputError, RunError

_METADATA_KEY = "vitlr"
_MAX_HEADER = 16 * 2**20  # bytes of JSON; the largest plan we know of takes 40 KiB
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def _failure(path: Path, cause: BaseException) -> Exception:
    full = getattr(cause, "errno", None) in _FULL
    if full or not isinstance(cause, OSError):
        return RunError(f"could not write {path}: {cause}; nothing was left there, free some space and run again")
    return InputError(f"cannot write {path}: {cause.strerror or cause}; choose a writable place")


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Refuse a destination that cannot be written, before any work is spent on it (`InputError`)."""
    path = Path(path)
    with atomic_path(path, commit=False):
        return path


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, commit: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on any failure.

    Raises `InputError` where the place is not writable and `RunError` where the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file in it")
    if path.exists() and not path.stat().st_mode & 0o222:  # a rename would replace it all the same
        raise InputError(f"cannot write {path}: the file is read-only; name another one")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as cause:
        raise _failure(path, cause) from cause
    temporary = Path(name)
    try:
        yield temporary
        if commit:
            _match_umask(temporary)
            _sync(temporary)
            os.replace(temporary, path)
    except (OSError, SafetensorError) as cause:
        raise _failure(path, cause) from cause
    finally:
        temporary.unlink(missing_ok=True)


def _match_umask(path: Path) -> None:
    """Give the file the mode that `open` would have given it; `mkstemp` makes it private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _sync(path: Path) -> None:
    with path.open("r+b") as file:  # Windows syncs only what may be written
        os.fsync(file.fileno())


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
    *,
    kind: str,
    schema: int,
) -> None:
    """Write tensors and a JSON header to one safetensors file, atomically.

    `kind` says what the file holds ("model", "statistics", ...), `schema` the version of its layout.
    """
    text = json.dumps({"kind": kind, "schema": schema, **header}, separators=(",", ":"), sort_keys=True)
    with atomic_path(path) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, {_METADATA_KEY: text})


def load_header(path: str | os.PathLike[str], *, kind: str, schema: int) -> dict[str, Any]:
    """Read and check the JSON header of a file that `save_tensors` wrote; no tensor is read."""
    path = Path(path)
    with _open(path) as file:
        return _header(path, file.metadata(), kind, schema)


def load_tensors(
    path: str | os.PathLike[str], *, kind: str, schema: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read tensors and header of a file that `save_tensors` wrote.

    Raises `InputError` where the file is missing, truncated, foreign, of another kind or of a newer schema.
    """
    path = Path(path)
    with _open(path) as file:
        header = _header(path, file.metadata(), kind, schema)
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a dict)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as cause:
        raise InputError(f"{path} is not a whole safetensors file ({cause}); was the copy cut short?") from cause
    except OSError as cause:
        raise InputError(f"cannot read {path}: {cause.strerror or cause}") from cause


def _header(path: Path, metadata: dict[str, str] | None, kind: str, schema: int) -> dict[str, Any]:
    text = (metadata or {}).get(_METADATA_KEY)
    if text is None:
        raise InputError(f"{path} was not written by vitlr; expected a vitlr {kind} file")
    if len(text) > _MAX_HEADER:
        raise InputError(f"{path}: its header has {len(text)} bytes, expected at most {_MAX_HEADER}; refused")
    try:
        header = json.loads(text)
        found_kind, found_schema = header["kind"], int(header["schema"])
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise InputError(f"{path}: its vitlr header is damaged; write the file again") from cause
    if found_kind != kind:
        raise InputError(f"{path} holds a vitlr {found_kind}, expected a {kind}")
    if not 1 <= found_schema <= schema:
        raise InputError(f"{path} has schema {found_schema}, this vitlr reads up to {schema}; upgrade vitlr")
    return header


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits that change with any name, shape, dtype or value of the weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
        digest.update(weight.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
