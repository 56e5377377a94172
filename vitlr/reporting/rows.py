"""The rows of a frontier: what one budget gave, kept in a folder and not measured twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vitlr.errors import InputError
from vitlr.runtime.kinds import FLAG, NONE, check, number, read_json, text, whole
from vitlr.runtime.places import atomic_path, is_file

DENSE, VITLR, PLAIN, INT8 = "dense", "vitlr", "plain", "int8"
_MAX_BYTES = 16 * 2**20
_NUMBER, _TEXT = number() | NONE, text(2000) | NONE
ROW: dict[str, Any] = {
    "name": text(200),
    "kind": text(20),
    "bytes": whole(0),
    "images": whole(0),
    **dict.fromkeys(("top1", "top1_low", "top1_high", "agreement", "kl", "cosine", "ms", "speedup"), _NUMBER),
    **dict.fromkeys(("params", "macs"), whole(0) | NONE),
    **dict.fromkeys(("method", "file", "key"), _TEXT),
    "rounds_only": FLAG,
}


@dataclass(frozen=True)
class Row:
    """One model: bytes of its file, how it was judged (see `Judged`), milliseconds an image and speed over dense.

    `kind` is "dense", "vitlr", "plain" (rounded to the nearest) or "int8" (multiplies bytes); `rounds_only` says that
    no layer is of another shape. Plain rows have no time: they run as dense does.
    """

    name: str
    kind: str
    bytes: int
    images: int
    top1: float | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None
    ms: float | None = None
    speedup: float | None = None
    params: int | None = None
    macs: int | None = None
    method: str | None = None
    file: str | None = None
    key: str | None = None
    rounds_only: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the key that it is kept under."""
        return {name: value for name, value in asdict(self).items() if name != "key"}


def key_of(*facts: Any) -> str:
    """A name for all that a row depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Kept:
    """Rows in `frontier.json` of a folder (None: nowhere), written as soon as each is measured."""

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "frontier.json"
        self.rows: dict[str, Row] = {}
        if self.path is not None and self.path.exists():
            self.rows = {str(row.key): row for row in read(self.path)}

    def get(self, key: str | None) -> Row | None:
        """The row of that key, if there is one and its file is still there."""
        row = self.rows.get(key or "")
        gone = row is not None and row.file is not None and self.path is not None
        return None if row is None or (gone and not is_file(self.path.parent / row.file)) else row  # type: ignore[union-attr,operator]

    def add(self, row: Row) -> None:
        """Keep a row, in the place of one of the same name."""
        if row.key is None or self.path is None:
            return
        self.rows = {key: old for key, old in self.rows.items() if old.name != row.name} | {row.key: row}
        write(self.path, self.rows.values())


def read(path: Path) -> list[Row]:
    """The rows of a file; `InputError` where it is none."""
    try:
        if not is_file(path) or path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is no file of rows")
        body = read_json(path.read_text())
        check(body, {"vitlr": text(100), "rows": [ROW]}, "its JSON")
        return [Row(**row) for row in body["rows"]]
    except (OSError, ValueError, TypeError) as cause:
        raise InputError(f"{path} holds no rows of a frontier ({cause}); remove it, or name another folder") from cause


def write(path: Path, rows: Iterable[Row]) -> None:
    """All rows, atomically."""
    from vitlr import __version__

    names = [item.name for item in fields(Row)]
    body = {"vitlr": __version__, "rows": [{name: getattr(row, name) for name in names} for row in rows]}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(body, indent=1) + "\n")
