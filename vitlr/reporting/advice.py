"""A frontier in words: the table of 80 columns, and one line that says what to take."""

from __future__ import annotations

from collections.abc import Sequence

from vitlr.reporting.judging import KEYS
from vitlr.reporting.rows import DENSE, PLAIN, VITLR, Row

POINTS = {"top1": 0.5, "agreement": 2.0, "cosine": 1.0}  # that may be lost, of a hundred
WORDS = {"top1": "top-1", "agreement": "agreement", "cosine": "cosine"}
_PAYS = 1.02  # times faster than dense, below which a row is not called so


def key_of(rows: Sequence[Row]) -> str:
    """What all rows are judged by."""
    return next(key for key in KEYS if getattr(rows[0], key) is not None)


def score(row: Row, key: str) -> float:
    """Of a hundred."""
    return float(getattr(row, key)) * (100 if key == "cosine" else 1)


def within(rows: Sequence[Row], points: float | None = None) -> list[Row]:
    """The rows that lose no more than `points` against the dense one, which is first."""
    key = key_of(rows)
    least = score(rows[0], key) - (POINTS[key] if points is None else points)
    return [row for row in rows if row.kind != DENSE and score(row, key) >= least - 1e-9]


def advice(rows: Sequence[Row], points: float | None = None) -> str:
    """The smallest and the fastest of the rows that lose no more than `points`, in one line."""
    key, dense = key_of(rows), rows[0]
    lost = f"At {POINTS[key] if points is None else points:g} points of {WORDS[key]} lost"
    good = within(rows, points)
    if not good:
        best = max((row for row in rows if row.kind != DENSE), key=lambda row: score(row, key), default=None)
        nearest = "" if best is None else f"; the best is {_said(best, key)}"
        return f"{lost} there is none{nearest}. Larger budgets, or --refine, lose less."
    small = min(good, key=lambda row: row.bytes)
    what = ", which only rounds weights" if small.kind == VITLR and small.rounds_only else ""
    text = f"{lost} the smallest is {_said(small, key)}{what} (dense: {_figures(dense, key)})"
    plain = min((row for row in good if row.kind == PLAIN), key=lambda row: row.bytes, default=None)
    if small.kind != PLAIN and any(row.kind == PLAIN for row in rows):
        text += f"; plain rounding alone: {'none' if plain is None else _said(plain, key)}"
    fast = max(good, key=lambda row: row.speedup or 0)
    if (fast.speedup or 0) > _PAYS:
        return f"{text}; the fastest is {fast.name}, {fast.speedup:.2f} times dense."
    return f"{text}; none is faster than dense here."


def _said(row: Row, key: str) -> str:
    return f"{row.name}: {_figures(row, key)}"


def _figures(row: Row, key: str) -> str:
    digits = ".4f" if key == "cosine" else ".1f"
    return f"{row.bytes / 1e6:.2f} MB, {WORDS[key]} {format(getattr(row, key), digits)}"


def table(rows: Sequence[Row]) -> str:
    """All rows in 80 columns, by size; empty where something was not measured."""
    key, dense = key_of(rows), rows[0]
    heads = {"top1": f"{'top-1 (95 %)':>17} {'agree':>6} {'KL':>7}", "agreement": f"{'agree':>6} {'KL':>7}"}
    width = max(len(row.name) for row in rows)
    lines = [f"{'':<{width}} {'MB':>7} {'of':>5} {heads.get(key, f'{WORDS[key]:>8}')} {'ms':>7} {'speed':>6}"]
    for row in sorted(rows, key=lambda row: -row.bytes):
        cells = [f"{row.name:<{width}}", f"{row.bytes / 1e6:>7.2f}", f"{row.bytes / max(dense.bytes, 1):>5.0%}"]
        if key == "top1":
            cells.append(f"{row.top1:>5.1f} {f'({row.top1_low:.1f}-{row.top1_high:.1f})':>11}")
        if key == "cosine":
            cells.append(f"{row.cosine:>8.4f}")
        else:
            cells += [f"{row.agreement:>6.1f}", f"{row.kl:>7.3f}"]
        cells += [f"{row.ms:>7.1f}" if row.ms is not None else " " * 7]
        cells += [f"{row.speedup:>5.2f}x" if row.speedup is not None else ""]
        lines.append(" ".join(cells).rstrip())
    notes = f"{dense.images} images. MB of the file. agree: same first class as dense, %. KL in nats."
    if key == "cosine":
        notes = f"{dense.images} images. MB of the file. cosine: of features to the dense ones, mean."
    times = ["ms of one image, fused, in turns with dense. Plain rounding runs as dense does,"]
    times += ["and so do rounded weights after vitlr.to_dense."]
    return "\n".join([*lines, notes, *times])
