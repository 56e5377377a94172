"""What a value read from a file may be: said once as a kind, checked here, named in the message by where it stood.

A kind is a `Kind`, a list of one kind (a list of any length of it), or a table of kinds by key, where "key?" may be
missing and "*" stands for all other keys.
"""

from __future__ import annotations

import json
import math
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vitlr.errors import InputError

_DEPTH = 32  # of JSON; a plan within a recipe within a header takes six
_NAME = 512  # letters of a name
_MOST = 2**53  # of a whole number: beyond, JSON's readers differ


@dataclass(frozen=True)
class Kind:
    """What is expected, in words, and the test for it."""

    said: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self.said} or {other.said}", lambda value: self.holds(value) or other.holds(value))


Spec = Kind | list[Any] | dict[str, Any]


def whole(low: int, high: int = _MOST) -> Kind:
    """A whole number from `low` to `high`; true and false are none."""
    bounds = f"from {low} on" if high == _MOST else f"from {low} to {high}"
    return Kind(f"a whole number {bounds}", lambda value: type(value) is int and low <= value <= high)


def number(low: float = -math.inf, high: float = math.inf) -> Kind:
    """A finite number from `low` to `high`."""
    bounds = "" if low == -math.inf else f" from {low:g} on" if high == math.inf else f" from {low:g} to {high:g}"
    return Kind(
        f"a finite number{bounds}",
        lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max and low <= value <= high,
    )


def among(*values: Any) -> Kind:
    """One of these, of its own type."""
    return Kind(
        f"one of {', '.join(map(str, values))}",
        lambda value: any(type(value) is type(one) and value == one for one in values),
    )


def tuple_of(kind: Kind, least: int, most: int) -> Kind:
    """A list of `least` to `most` of a kind."""
    return Kind(
        f"a list of {least} to {most}, each {kind.said}",
        lambda value: isinstance(value, (list, tuple)) and least <= len(value) <= most and all(map(kind.holds, value)),
    )


def text(most: int) -> Kind:
    """A string of printable characters."""
    return Kind(
        f"text of at most {most} letters",
        lambda value: isinstance(value, str) and len(value) <= most and value.isprintable(),
    )


NONE, FLAG, NAME = Kind("null", lambda value: value is None), among(True, False), text(_NAME)
ANY_NUMBER = Kind("a number", lambda value: type(value) in (int, float))
PLAIN = Kind(f"plain JSON at most {_DEPTH} deep", lambda value: _deep(value, _DEPTH))


def check(value: Any, spec: Spec, where: str) -> None:
    """Raise `InputError` naming the first part of `value` that is not of its kind."""
    if isinstance(spec, Kind):
        if not spec.holds(value):
            raise InputError(f"{where} {shown(value)}, expected {spec.said}")
    elif isinstance(spec, list):
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} {shown(value)}, expected a list")
        for index, part in enumerate(value):
            check(part, spec[0], f"{where}[{index}]")
    else:
        _check_table(value, spec, where)


def _check_table(value: Any, spec: dict[str, Any], where: str) -> None:
    if not isinstance(value, Mapping) or not all(map(NAME.holds, value)):
        raise InputError(f"{where} {shown(value)}, expected a table by names")
    known = {key.rstrip("?"): kind for key, kind in spec.items()}
    for key in spec:
        if key != "*" and not key.endswith("?") and key not in value:
            raise InputError(f"{where} has no {key}")
    for key, part in value.items():
        kind = known.get(key, known.get("*"))
        if kind is None:
            raise InputError(f"{where} has {shown(key)}, which is unknown")
        check(part, kind, f"{where}: {key}" if "*" in spec else f"{where} {key}")


def shown(value: Any) -> str:
    """A value in a message: cut short, whatever it holds."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)


def read_json(source: str) -> Any:
    """The value of a JSON text; `ValueError` where it is none, or nested too deep for whoever reads it next."""
    try:
        value = json.loads(source)
    except RecursionError as cause:
        raise ValueError("it is nested too deep") from cause
    if not _deep(value, _DEPTH):
        raise ValueError("it is nested too deep")
    return value


def _deep(value: Any, levels: int) -> bool:
    """Whether this is made of JSON's values and goes no deeper than so many levels."""
    if isinstance(value, (list, tuple, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return levels > 0 and all(_deep(part, levels - 1) for part in parts)
    return value is None or isinstance(value, (bool, int, float, str))
