"""Safetensors with one JSON header and a digest over both, written atomically, read defensively."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitlr.errors import InputError
from vitlr.runtime.kinds import read_json, shown, whole
from vitlr.runtime.mapped import put_away
from vitlr.runtime.places import atomic_path, is_file

_METADATA_KEY = "vitlr"
_MAX_HEADER = 16 * 2**20  # bytes of JSON; the largest plan we know of takes 40 KiB
_MAX_NAMES = 32 * 2**20  # bytes of that and of the names and shapes of all tensors
_DIGEST = "sha256"  # of the header without it, and of the tensors
_logger = logging.getLogger("vitlr")


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
    *,
    kind: str,
    schema: int,
) -> None:
    """Write tensors and a JSON header to one safetensors file, atomically.

    `kind` says what the file holds ("model", "statistics", ...), `schema` the version of its layout. A header that has
    no digest of its own is followed by one. Raises `InputError` for a header that could not be read back.
    """
    stored = {name: t.detach().contiguous() for name, t in tensors.items()}
    body = {"kind": kind, "schema": schema, **header}
    if "digest" not in header:
        body[_DIGEST] = digest(stored, _written(body))
    text = _written(body)  # under one key of the metadata: of several, safetensors leaves the order to chance
    try:
        _read_header(text)
    except ValueError as cause:
        raise InputError(
            f"cannot write {path}: its header would not be read back ({cause}); keep less in it"
        ) from cause
    with atomic_path(path) as temporary:
        save_file(stored, temporary, {_METADATA_KEY: text})


def _written(header: Mapping[str, Any]) -> str:
    return json.dumps(header, separators=(",", ":"), sort_keys=True)


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """The SHA-256 over a text and every tensor's name, dtype, shape and bytes, in order of names."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        put_away(tensor)
    return f"sha256:{sha.hexdigest()}"


def load_header(path: str | os.PathLike[str], *, kind: str, schema: int) -> dict[str, Any]:
    """Read and check the JSON header of a file that `save_tensors` wrote; no tensor is read."""
    path = Path(path)
    with _open(path) as file:
        header = _header(path, file.metadata(), kind, schema)
    header.pop(_DIGEST, None)
    return header


def digest_told(path: str | os.PathLike[str], *, kind: str, schema: int) -> str | None:
    """The digest that a file of `save_tensors` says its content has; None for files of earlier versions."""
    path = Path(path)
    with _open(path) as file:
        return _header(path, file.metadata(), kind, schema).get(_DIGEST)


def load_tensors(
    path: str | os.PathLike[str], *, kind: str, schema: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read tensors and header of a file that `save_tensors` wrote.

    Raises `InputError` where the file is missing, truncated, foreign, of another kind or of a newer schema, and where
    its digest does not match. Files of earlier versions that have none are read with a note.
    """
    path = Path(path)
    with _open(path) as file:
        header = _header(path, file.metadata(), kind, schema)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if _DIGEST in header:
        check_digest(path, header.pop(_DIGEST), digest(tensors, _written(header)))
    elif "digest" not in header:  # a model's, which its reader checks
        _logger.warning("%s is of an earlier vitlr and has no digest: flipped bits in it would not be seen", path)
    return tensors, header


def check_digest(path: object, told: Any, found: str) -> None:
    """Raise `InputError` where a file says another digest than its content has."""
    if told != found:
        raise InputError(f"{path}: its digest does not match what it holds: the file is damaged or was changed")


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not is_file(path):
        raise InputError(f"{path}: no such file; check the path")
    try:
        with path.open("rb") as raw:
            start = raw.read(8)
        if start.startswith((b"PK\x03\x04", b"\x80\x02")):
            raise InputError(
                f"{path} is a file of torch.save, no safetensors file; vitlr.create_model(NAME, checkpoint=...) reads "
                "weights from it"
            )
        if len(start) == 8 and (names := struct.unpack("<Q", start)[0]) > _MAX_NAMES:
            raise InputError(f"{path} is not a whole safetensors file, or names {names} bytes of tensors; refused")
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as cause:
        raise InputError(f"{path} is not a whole safetensors file ({cause}); was the copy cut short?") from cause
    except OSError as cause:
        raise InputError(f"cannot read {path}: {cause.strerror or cause}") from cause


def _read_header(text: str) -> dict[str, Any]:
    """The header; `ValueError` for a text that is none."""
    if len(text) > _MAX_HEADER:
        raise ValueError(f"it has {len(text)} bytes, more than {_MAX_HEADER}: refused")
    header = read_json(text)
    if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
        raise ValueError("it is no table with a kind")
    return header


def _header(path: Path, metadata: dict[str, str] | None, kind: str, schema: int) -> dict[str, Any]:
    text = (metadata or {}).get(_METADATA_KEY)
    if text is None:
        raise InputError(f"{path} was not written by vitlr; expected a vitlr {kind} file")
    try:
        header = _read_header(text)
    except ValueError as cause:
        raise InputError(f"{path}: its vitlr header is damaged ({cause}); write the file again") from cause
    if header["kind"] != kind:
        raise InputError(f"{path} holds a vitlr {header['kind']:.40}, expected a {kind}")
    found: Any = header.get("schema")
    if not whole(1).holds(found):
        raise InputError(f"{path}: its vitlr header is damaged: schema {shown(found)}; write the file again")
    if found > schema:
        raise InputError(f"{path} has schema {found}, this vitlr reads up to {schema}; upgrade vitlr")
    return header


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits that change with any name, shape, dtype or value of the weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
        digest.update(weight.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
