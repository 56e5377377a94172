"""Plain rounding to the nearest, as `vitlr frontier` does it, in more widths."""

from __future__ import annotations

from pathlib import Path

from bench.compare.frontier.rivals import GROUP, Made, Make
from bench.compare.frontier.subjects import Subject
from vitlr.reporting.nearest import nearest

NEAREST = (8, 6, 4, 3, 2)  # bits


def plain(bits: int, group: int | None) -> Make:
    """Every weight of a block to the nearest of `2^bits` values of its group (None: of its row)."""

    def make(subject: Subject, folder: Path) -> Made:
        return *nearest(subject.model, bits, group), {}

    return make


PLAIN = {
    f"nearest, {bits} bits, {'a row' if group is None else f'groups of {group}'}": plain(bits, group)
    for bits in NEAREST
    for group in (GROUP, None)
}
