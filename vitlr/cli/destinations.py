"""Where a command writes: refused before any work where it cannot be written, or where that would destroy something."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vitlr.errors import InputError


def check_destinations(outputs: Mapping[str, Path | None], inputs: Mapping[str, str | Path | None]) -> None:
    """Refuse places that cannot be written, that are read or written twice, and an --out that holds something else.

    Both by their flags; flags without a path are left out.
    """
    from vitlr.runtime.storage import check_writable

    named = {flag: path for flag, path in outputs.items() if path}
    others = {**{flag: Path(path) for flag, path in inputs.items() if path}, **named}
    for flag, path in named.items():
        check_writable(path)
        twin = next((f for f, p in others.items() if f != flag and p.resolve() == path.resolve()), None)
        if twin is not None:
            raise InputError(f"{flag} and {twin} are both {path}; name two files")
    if named.get("--out") is not None:
        _check_replaceable(named["--out"])


def _check_replaceable(out: Path) -> None:
    """An earlier result may be replaced; a file that is none, such as somebody's only copy of weights, may not."""
    from vitlr.checkpoint import files
    from vitlr.runtime import storage

    if not out.exists() or out.stat().st_size == 0:
        return
    try:
        storage.load_header(out, kind="model", schema=files.SCHEMA)
    except InputError as cause:
        raise InputError(f"--out {out} is there and is no vitlr model; remove it or name another file") from cause
