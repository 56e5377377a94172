"""Times of candidates measured on real devices: small tables, asked for the nearest shape.

A table is `measured/<device>.json`: `{"device", "date", "torch", "rows": [{"op", "key", "us"}]}`, written by
`bench/gpu_gate.py --report` from what that device did. `key` holds the fields of the op's `Key` but the device, `us`
microseconds by candidate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1] / "measured"
OCTAVES = 1.0
"""How far the nearest row may be: `Σ |log2(a / b)|` over its sizes. Beyond, the roofline is the better guess."""


@dataclass(frozen=True)
class Measurement:
    """Microseconds by candidate, and the sizes at which they were measured."""

    us: Mapping[str, float]
    key: Mapping[str, Any]


def nearest(op: str, key: Any) -> Measurement | None:
    """The measurement nearest to a key on its device, in octaves; None where there is none near."""
    asked = describe(key)
    if None in (asked.get("M", 0), asked.get("T", 0)):  # rows not known yet
        return None
    near = [
        (distance, row) for row in table(device_name(key.device)) if (distance := _octaves(op, asked, row)) <= OCTAVES
    ]
    if not near:
        return None
    row = min(near, key=lambda found: found[0])[1]
    return Measurement(row["us"], row["key"])


def describe(key: Any) -> dict[str, Any]:
    """The fields of a key but its device, as plain values."""
    fields = {name: value for name, value in key._asdict().items() if name != "device"}
    return {name: str(value).removeprefix("torch.") if name == "dtype" else value for name, value in fields.items()}


def device_name(device: torch.device) -> str:
    """The name by which a table knows a device; the CPU has none."""
    if device.type == "cuda" and torch.cuda.is_available():
        return _card(device.index if device.index is not None else torch.cuda.current_device())
    return ""


@cache
def _card(index: int) -> str:
    return torch.cuda.get_device_name(index)


@cache
def table(device: str) -> tuple[Mapping[str, Any], ...]:
    """The rows measured on a device."""
    path = FOLDER / f"{file_name(device)}.json"
    return tuple(json.loads(path.read_text())["rows"]) if device and path.is_file() else ()


def file_name(device: str) -> str:
    """`NVIDIA H200` -> `nvidia_h200`."""
    return "".join(letter if letter.isalnum() else "_" for letter in device.lower())


def _octaves(op: str, asked: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    there = row["key"]
    if row["op"] != op or there.keys() != asked.keys():
        return math.inf
    return sum(_apart(value, there[name]) for name, value in asked.items())


def _apart(value: Any, other: Any) -> float:
    """Octaves between two sizes, or between those of two chains; 0 for what is the same, and else infinity."""
    if type(value) is int and type(other) is int:
        return abs(math.log2(max(value, 1) / max(other, 1)))
    if isinstance(value, (tuple, list)) and isinstance(other, (tuple, list)):  # JSON knows no tuples
        same = len(value) == len(other)
        return sum(map(_apart, value, other)) if same else math.inf
    return 0.0 if value == other else math.inf
