"""What a plan's JSON may hold: it may come from anywhere, and is printed, added up and applied."""

from __future__ import annotations

from typing import Any

from vitlr.calibration.options import OBJECTIVES
from vitlr.planning.latency import LATENCY
from vitlr.runtime import compact
from vitlr.runtime.kinds import FLAG, NAME, NONE, PLAIN, among, number, text, tuple_of, whole

LEVELS = 1000  # of rounding, either way
ROUNDS = 8  # of calibration at most, the last plan's among them
BITS = number(0, 1e6) | NONE  # of a file for each weight
_SIZE, _TOTAL, _REASON = whole(1, 2**31), whole(0), text(2000)
LAYER: dict[str, Any] = {
    "name": NAME,
    "in_features": _SIZE,
    "out_features": _SIZE,
    "rank": _SIZE | NONE,
    "tokens": number(0, 1e12),
    "error": number(),
    "reason": _REASON,
    "kept_in?": _SIZE | NONE,
    "kept_out?": _SIZE | NONE,
    "level?": whole(-LEVELS, LEVELS) | NONE,
    "int8?": FLAG,
    "ms?": number(0, 1e12),
    "bits?": PLAIN,  # `BITS`, said in its own words
}
WIDTH: dict[str, Any] = {
    "name": NAME,
    "full_width": _SIZE,
    "width": _SIZE,
    "error": number(),
    "reason": _REASON,
    "kind?": NAME,
}
OTHER: dict[str, Any] = {"name": NAME, "bits": whole(compact.BITS[-1], compact.BITS[0]), "error": number()}
PLAN: dict[str, Any] = {
    "schema": whole(1),
    "budget": _REASON,
    "objective": among(*OBJECTIVES),
    "centred": FLAG,
    "damping": number(0),
    "layers": [LAYER],
    "widths?": [WIDTH],
    "others?": [OTHER],
    "fingerprint": NAME,
    "params": _TOTAL,
    "params_kept": _TOTAL,
    "macs": _TOTAL,
    "macs_kept": _TOTAL,
    "bytes": _TOTAL,
    "bytes_kept": _TOTAL,
    "method?": NAME,
    "compensated?": FLAG,
    "ridge?": number(0),
    "latency?": LATENCY,
    "earlier?": tuple_of(PLAIN, 1, ROUNDS - 1),  # plans, each of which is checked as one
}
