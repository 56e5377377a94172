"""What dispatch would choose once these kernels have run here and these times are in its table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from vitlr.ops.dispatch import measured, registry

WANTED = 1.03
"""How much slower than the best candidate the chosen one may be, anywhere on the grid."""


@contextmanager
def trusting(device: torch.device, rows: list[dict[str, Any]]) -> Iterator[None]:
    """Dispatch as it would be with these measured rows, and with every kernel known to run on this device."""
    before = {name: op.candidates for name, op in registry._ops.items()}
    for op in registry._ops.values():
        op.candidates = [c if c.ran_on else replace(c, ran_on=(str(device),)) for c in op.candidates]
    registry._chosen.clear()
    try:
        with patch.object(measured, "table", lambda name: tuple(rows)):
            yield
    finally:
        for name, candidates in before.items():
            registry._ops[name].candidates = candidates
        registry._chosen.clear()


def check(device: torch.device, rows: list[dict[str, Any]]) -> list[str]:
    """Add `chosen` to every row; the rows where another candidate is more than `WANTED` times as fast."""
    slow = []
    with trusting(device, rows):
        for row in rows:
            chosen = row["chosen"] = registry.select(row["op"], _key(row, device)).name
            best = min(row["us"][name] for name in row["candidates"])
            if row["us"][chosen] > WANTED * best:
                slow.append(
                    f"{row['op']} {row['call']}: {chosen} is {row['us'][chosen] / best:.2f}x the best candidate"
                )
    return slow


def by_neighbours(rows: list[dict[str, Any]]) -> tuple[float, str]:
    """The worst ratio to the best candidate where each row is chosen for by the nearest *other* row, and where it is.

    It tells how well the table serves shapes that nobody measured.
    """
    worst, where = 1.0, ""
    for row in rows:
        others = [other for other in rows if other is not row]
        near = min(others, key=lambda other: measured._octaves(row["op"], row["key"], other), default=None)
        if near is None or math.isinf(measured._octaves(row["op"], row["key"], near)):
            continue
        shared = [name for name in row["candidates"] if name in near["us"]]
        chosen = min(shared, key=lambda name: near["us"][name])
        ratio = row["us"][chosen] / min(row["us"][name] for name in row["candidates"])
        if ratio > worst:
            worst, where = ratio, f"{row['op']} {row['call']}: {chosen}"
    return worst, where


def _key(row: dict[str, Any], device: torch.device) -> Any:
    fields = {**row["key"], "device": device}
    if "dtype" in fields:
        fields["dtype"] = getattr(torch, fields["dtype"])
    return registry._ops[row["op"]].key_type(**fields)
