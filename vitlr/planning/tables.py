"""A plan as people read it: a table of 80 columns, what is left alone summed up, every reason said once."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vitlr.planning.options import ROUNDED
from vitlr.runtime.words import gathered, numbered, tail

COLUMNS = 80
KINDS = {"mlp": "width", "channels": "value", "heads": "heads", "query_keys": "q·k"}  # of widths, and the table's words
MANY = 24  # rows beyond which those that change nothing are summed up


@dataclass(frozen=True)
class Line:
    """A row of the table: `own` are the cells of rank, bits and time; `same` says that nothing changes here."""

    name: str
    size: str
    own: str
    error: float
    params: int | None
    reason: str
    same: bool
    count: int = 1


def shown_plan(plan: Any) -> str:
    """All of a `Plan`, which is not imported here: it prints itself by this."""
    rounded = plan.method in ROUNDED or bool(plan.levels)
    ranked, timed = not rounded or bool(plan.ranks), plan.latency is not None
    heads = "  ".join([f"{'rank':>5}"] * ranked + [f"{'bits':>5}  {'level':>5}"] * rounded + [f"{'ms':>8}"] * timed)
    lines = [*_layers(plan, ranked, rounded, timed), *_widths(plan, len(heads)), *_others(plan, ranked)]
    lines = summed(lines) if len(lines) > MANY else lines
    own = max(len(heads), max((len(line.own) for line in lines), default=0))
    width = min(max((len(line.name) for line in lines), default=5), COLUMNS - own - 43)  # of the cells beside it
    reasons = list(dict.fromkeys(line.reason for line in lines))
    said = [f"{'layer':<{width}}  {'W':>11}  {heads:<{own}}  {'error':>9}  {'params':>10}  why"]
    for line in lines:
        params = "" if line.params is None else f"{line.params:,}"
        said.append(
            f"{tail(line.name, width):<{width}}  {line.size:>11}  {line.own:<{own}}  {line.error:>9.3g}  {params:>10}  "
            f"{letter(reasons.index(line.reason))}"
        )
    for index, reason in enumerate(reasons):
        count = sum(line.count for line in lines if line.reason == reason)
        said.append(_filled(f"  {letter(index)}  {count} x {reason}", 5))
    return "\n".join([*said, *_totals(plan, ranked, rounded)])


def _layers(plan: Any, ranked: bool, rounded: bool, timed: bool) -> Iterator[Line]:
    for layer in plan.layers:
        rank = f"{'dense' if layer.rank is None else layer.rank:>5}"
        bits = f"{'as is':>5}  {'':>5}" if layer.level is None else f"{layer.bits or 0:>5.2f}  {layer.level:>5}"
        own = "  ".join([rank] * ranked + [bits] * rounded + [f"{layer.ms or 0:>8.3f}"] * timed)
        same = layer.rank is None and layer.level is None and layer.kept_in is None and layer.kept_out is None
        size = "x".join(map(str, layer.shape))
        yield Line(layer.name, size, own, layer.error, layer.params, layer.reason, same and not (timed or layer.int8))


def _widths(plan: Any, own: int) -> Iterator[Line]:
    for row in plan.widths:
        size, same = f"{row.width}/{row.full_width}", row.width == row.full_width
        yield Line(row.name, size, f"{KINDS[row.kind]:<{own}}", row.error, None, row.reason, same)


def _others(plan: Any, ranked: bool) -> Iterator[Line]:
    for row in plan.others:
        own = "  ".join([" " * 5] * ranked + [f"{row.bits:>5}  {'':>5}"])
        yield Line(row.name, "", own, row.error, None, "a matrix beside the linears: bits a row", False)


def summed(lines: list[Line]) -> list[Line]:
    """Lines that change nothing and differ in one number of their names only, as one, in the first one's place."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for index, line in enumerate(lines):
        pattern, number = numbered(line.name)
        alike = (pattern, line.size, line.own, line.reason) if line.same and number is not None else (str(index),)
        groups.setdefault(alike, []).append(line)
    found = []
    for (pattern, *_), some in groups.items():
        if len(some) == 1:
            found += some
            continue
        name = gathered(pattern, [number for line in some if (number := numbered(line.name)[1]) is not None])
        params = None if some[0].params is None else sum(line.params or 0 for line in some)
        error = sum(line.error for line in some)
        found.append(replace(some[0], name=name, error=error, params=params, count=len(some)))
    return found


def letter(index: int) -> str:
    """a, b, … z, aa, ab, …"""
    return (letter(index // 26 - 1) if index >= 26 else "") + "abcdefghijklmnopqrstuvwxyz"[index % 26]


def _totals(plan: Any, ranked: bool, rounded: bool) -> Iterator[str]:
    narrowed = ""
    for what, rows in (
        ("MLPs", [row for row in plan.widths if row.kind == "mlp"]),
        ("attentions", [row for row in plan.widths if row.kind != "mlp"]),
    ):
        if rows:
            narrowed += f"{sum(row.width < row.full_width for row in rows)} of {len(rows)} {what} narrowed, "
    if plan.why:
        yield f"method {plan.method}: {plan.why}"
    done = f"{len(plan.levels)} of {len(plan.layers)} layers rounded, " if rounded else ""
    done += f"{len(plan.bytes_layers)} of {len(plan.layers)} layers multiply bytes, " if plan.bytes_layers else ""
    done += f"{len(plan.ranks)} of {len(plan.layers)} layers factorised, " if ranked else ""
    yield _filled(f"{plan.budget}, objective {plan.objective}: {done}{narrowed}predicted error {plan.error:.4g}", 2)
    if plan.earlier:
        left, error = plan.earlier[-1].params_kept / 1e6, sum(one.error for one in plan.earlier)
        rounds = f"{len(plan.earlier)} earlier round{'s' * (len(plan.earlier) > 1)} of widths left {left:.3f} M params"
        yield _filled(f"  {rounds} (predicted error {error:.4g}); rows are of what followed", 4)
    for what, unit, scale in (("params", "M", 1e6), ("macs", "G", 1e9), ("bytes", "MB", 1e6)):
        before, after = getattr(plan, what), getattr(plan, f"{what}_kept")
        share = after / max(before, 1)
        yield f"  {what:<6} {before / scale:9.3f} {unit} -> {after / scale:9.3f} {unit}  ({share:.1%} kept)"
    if plan.latency is not None:
        yield str(plan.latency)


def _filled(text: str, indent: int) -> str:
    return textwrap.fill(text, COLUMNS, subsequent_indent=" " * indent, break_on_hyphens=False)
