"""The file of measured times in the user's cache: by machine and build, so that nothing stale is ever read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vitlr.errors import InputError, RunError
from vitlr.ops.backends import native
from vitlr.runtime.kinds import check, number, read_json, whole
from vitlr.runtime.machine import processor
from vitlr.runtime.places import atomic_path, is_file

_logger = logging.getLogger("vitlr")
_SCHEMA = 1
_FILE = {"schema": whole(1), "machines": {"*": {"*": number(0, 1e9)}}}
_MOST = 64 * 2**20  # bytes


def place() -> Path:
    """Where it is."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "vitlr" / "times.json"


def machine(threads: int) -> str:
    """All that a time depends on besides the shape: processor, instructions, threads, builds of torch and vitlr."""
    isa = native.isa_used() if native.available() else "none"
    backend = os.environ.get("VITLR_BACKEND", "")
    words = [processor(), isa, f"{threads} threads", f"torch {torch.__version__}", f"vitlr {_build()}"]
    return ", ".join(words + [f"VITLR_BACKEND={backend}"] * bool(backend))


def read(threads: int) -> dict[str, float]:
    """Times of this machine by name; none where the file is not there, of another version or damaged, which is said."""
    return dict(_tables().get(machine(threads), {}))


def add(threads: int, found: dict[str, float]) -> None:
    """Keep these times for the next run; where nothing can be written, that is said and nothing else happens."""
    path, tables = place(), _tables()
    tables.setdefault(machine(threads), {}).update(found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"schema": _SCHEMA, "machines": tables}, indent=1, sort_keys=True) + "\n")
    except (OSError, InputError, RunError) as cause:
        _logger.warning("measured times are not kept: %s", cause)


def _tables() -> dict[str, Any]:
    path = place()
    if not is_file(path):
        return {}
    try:
        if path.stat().st_size > _MOST:
            raise InputError(f"it has more than {_MOST} bytes")
        body = read_json(path.read_text())
        check(body, _FILE, "the table")
    except (OSError, ValueError, InputError) as cause:
        _logger.warning("%s is damaged (%s); times are measured again", path, cause)
        return {}
    return body["machines"] if body["schema"] == _SCHEMA else {}


@cache
def _build() -> str:
    """The version, and what tells one build of the kernels from another."""
    from vitlr import __version__

    file = getattr(native._C, "__file__", None)
    content = Path(file).read_bytes() if file else b""
    return f"{__version__} {hashlib.sha256(content).hexdigest()[:12]}"
