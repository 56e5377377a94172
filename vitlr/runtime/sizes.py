"""Amounts of bytes, as people write them: `2GB`, `750MB`, `1.5GiB`."""

from __future__ import annotations

import re

from vitlr.errors import InputError

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:e([+-]?\d{1,3}))?\s*([kmg]i?b?|b)?", re.IGNORECASE)


def in_units(number: float, unit: str) -> float:
    """So many k, M, G, KiB, MiB, GiB (with or without the B)."""
    unit = unit.lower()
    return number * UNITS[unit if unit.endswith("ib") else unit.removesuffix("b")]


def read_bytes(text: str | float, name: str) -> float:
    """An amount of bytes; `InputError` naming the option where it cannot be read or is none."""
    match = _AMOUNT.fullmatch(str(text).strip())
    found = in_units(float(f"{match[1]}e{match[2] or 0}"), match[3] or "") if match else 0.0
    if not 0 < found < float("inf"):
        raise InputError(f"{name}={text!r}, expected bytes above 0, as in 2GB, 750MB or 1.5GiB")
    return found


def said_bytes(count: float) -> str:
    """In the unit that people would take."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
