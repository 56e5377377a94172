"""Layers by where they stand: `blocks.3.mlp.fc1` is the kind `mlp.fc1` of block 3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MOST = 8  # kinds that a figure can tell apart


def place(name: str) -> tuple[str, tuple[str, ...]]:
    """The kind of a layer, which is what follows the last number inside its name, and the numbers up to there."""
    parts = name.split(".")
    last = max((index for index, part in enumerate(parts[:-1]) if part.isdecimal()), default=-1)
    return ".".join(parts[last + 1 :][-3:]), tuple(part for part in parts[: last + 1] if part.isdecimal())


def by_kind(rows: Iterable[Any]) -> dict[str, list[tuple[int, Any]]]:
    """Rows that have a `name`, by kind in the order they come, each with the number of its block, from 0 on."""
    found: dict[str, list[tuple[int, Any]]] = {}
    blocks: dict[tuple[str, ...], int] = {}
    for row in rows:
        kind, numbers = place(row.name)
        found.setdefault(kind, []).append((blocks.setdefault(numbers, len(blocks)), row))
    if len(found) <= MOST:
        return found
    kinds = list(found)
    rest = [pair for kind in kinds[MOST - 1 :] for pair in found[kind]]
    return {**{kind: found[kind] for kind in kinds[: MOST - 1]}, "others": rest}
