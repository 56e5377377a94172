"""What dispatch would choose once these kernels have run here and these times are in its table."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from bench.gate.lines import Who
from vitlr.ops.dispatch import measured, registry

WANTED = 1.03
"""How much slower than the best candidate the chosen one may be, anywhere on the grid."""

Row = dict[str, Any]


@contextmanager
def trusting(device: torch.device, rows: Sequence[Row], excluded: Collection[Who] = ()) -> Iterator[None]:
    """Dispatch as it would be with these measured rows, every kernel known to run here but those that are excluded."""
    before = {name: op.candidates for name, op in registry._ops.items()}
    for name, op in registry._ops.items():
        op.candidates = [_trusted(name, c, device, excluded) for c in op.candidates]
    registry._chosen.clear()
    try:
        with patch.object(measured, "table", lambda name: tuple(rows)):
            yield
    finally:
        for name, candidates in before.items():
            registry._ops[name].candidates = candidates
        registry._chosen.clear()


def _trusted(op: str, candidate: Any, device: torch.device, excluded: Collection[Who]) -> Any:
    bad = {dtype for name, who, dtype in excluded if (name, who) == (op, candidate.name)}

    def supports(key: Any) -> str | None:
        if str(getattr(key, "dtype", "")).removeprefix("torch.") in bad:
            return "it failed the gate"
        return candidate.supports(key)

    return replace(candidate, ran_on=candidate.ran_on or (str(device),), supports=supports)


def chosen(device: torch.device, rows: Sequence[Row], excluded: Collection[Who] = ()) -> list[Row]:
    """Rows {op, call, chosen, ratio}: what dispatch takes, and its time over that of the best candidate."""
    found = []
    with trusting(device, rows, excluded):
        for row in rows:
            name = registry.select(row["op"], key_of(row, device)).name
            us = row["us"]
            best = min(us.values())
            found.append({"op": row["op"], "call": row["call"], "chosen": name, "ratio": us.get(name, math.inf) / best})
    return found


def by_neighbours(rows: Sequence[Row]) -> tuple[float, str]:
    """The worst ratio to the best candidate where each row is chosen for by the nearest *other* row, and where it is.

    It tells how well the table serves shapes that nobody measured.
    """
    worst, where = 1.0, ""
    for row in rows:
        others = [other for other in rows if other is not row]
        near = min(others, key=lambda other: measured._octaves(row["op"], row["key"], other), default=None)
        if near is None or math.isinf(measured._octaves(row["op"], row["key"], near)):
            continue
        shared = [name for name in row["us"] if name in near["us"]]
        if not shared:
            continue
        name = min(shared, key=lambda name: near["us"][name])
        ratio = row["us"][name] / min(row["us"].values())
        if ratio > worst:
            worst, where = ratio, f"{row['op']} {row['call']}: {name}"
    return worst, where


def key_of(row: Row, device: torch.device) -> Any:
    """The op's key of a row."""
    listed = {name: tuple(value) if isinstance(value, list) else value for name, value in row["key"].items()}
    fields = {**listed, "device": device}  # JSON knows no tuples
    if "dtype" in fields:
        fields["dtype"] = getattr(torch, fields["dtype"])
    return registry._ops[row["op"]].key_type(**fields)
