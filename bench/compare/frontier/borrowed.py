"""Rows that `bench.compare.bits` has measured on the same model and images: taken over, not measured twice."""

from __future__ import annotations

from typing import Any

FIGURES = ("top1", "top1_low", "top1_high", "agreement", "kl", "bytes")
FAMILIES = {"refined": "vitlr refined", "mix": "vitlr mixed", "vitlr": "vitlr bits"}  # by what its method says, first


def borrowed(bits: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of bits.json as rows of the frontier."""
    return [_row(row, bits) for row in bits["rows"]]


def _row(row: dict[str, Any], bits: dict[str, Any]) -> dict[str, Any]:
    family = next((family for said, family in FAMILIES.items() if said in row["method"]), None)
    name = row["method"] if family is None else f"{family}, {row['bytes'] / 1e6:.1f} MB"
    seconds = round(row.get("cpu_seconds", 0) + row.get("refining_cpu_seconds", 0), 1)
    made = {key: row.get(key, bits[key]) for key in ("code", "machine")}
    return {"name": name, **{key: row[key] for key in FIGURES}, "cpu_seconds": seconds, **made, "tools": {}}


def merged(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with others added, or put in the place of those of the same name."""
    names = {row["name"] for row in new}
    return [*(row for row in rows if row["name"] not in names), *new]
