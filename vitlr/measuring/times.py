"""What layers take on this machine: a table of measured times, and straight lines between its entries.

A shape is timed dense at a few widths, and at a few ranks at the full and at a narrow width, in floats and in bytes.
Ranks and widths that are timed are where the kernels' tiles end, as far as there are such.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vitlr.measuring import clock, times_file
from vitlr.measuring.specimens import Shape, specimen
from vitlr.runtime.progress import Progress

WIDTHS = (0.125, 0.25, 0.5, 0.75, 1.0)  # shares of the full one that are timed
NARROW = 0.25  # where ranks are timed besides
RANKS = (16, 32, 64, 128, 256, 512, 1024, 2048)
TILE = 32  # columns of the kernels' tiles; ranks and widths between them take what the next tile does, or nearly


@dataclass(frozen=True)
class Times:
    """Milliseconds a batch: of the whole dense model, and of shapes in any form by what was `measured` of them."""

    batch_size: int
    threads: int
    dtype: str
    whole: float
    measured: Mapping[str, float]

    def ms(self, shape: Shape, width: int, rank: int | None, int8: bool) -> float:
        """Of a shape at a width and a rank, or dense, of floats or of bytes."""
        if rank is None:
            return self._between(width, [(w, self._read(shape, w, None, int8)) for w in widths(shape)])
        columns = []
        for w in _factored(shape):
            points = [(r, self._read(shape, w, r, int8)) for r in ranks(shape, w)]
            if points:
                columns.append((w, self._between(rank, points)))
        return self._between(width, columns)

    def _read(self, shape: Shape, width: int, rank: int | None, int8: bool) -> float:
        return self.measured[shape.named(width, rank, int8, self.dtype)] * shape.rows / shape.timed_rows

    @staticmethod
    def _between(at: float, points: Sequence[tuple[float, float]]) -> float:
        """On the straight lines through these points, which go on beyond the last; never below half of the least."""
        x, y = (np.array(values, dtype=float) for values in zip(*points, strict=True))
        y = np.minimum.accumulate(y[::-1])[::-1]  # less takes no longer: what was measured so was disturbed
        if len(x) == 1 or x[0] <= at <= x[-1]:
            return float(np.interp(at, x, y))
        a, b = (0, 1) if at < x[0] else (-2, -1)
        return float(max(y[a] + (at - x[a]) * (y[b] - y[a]) / (x[b] - x[a]), 0.5 * y.min()))


def widths(shape: Shape) -> list[int]:
    """The widths that are timed, the full one last."""
    if shape.narrows is None:
        return [0]
    return sorted({min(max(_tiled(share * shape.width), 1), shape.width) for share in WIDTHS[:-1]} | {shape.width})


def ranks(shape: Shape, width: int) -> list[int]:
    """The ranks that are timed at a width, up to where low rank stops being smaller."""
    most = shape.break_even(width)
    last = max(most - most % 16, 1)
    found = {rank for rank in RANKS if rank < last} | {last}
    return sorted(found if len(found) > 1 else {max(last // 2, 1), last}) if most else []


def _factored(shape: Shape) -> list[int]:
    """The widths at which ranks are timed: a narrow one and the full one."""
    found = widths(shape)
    return sorted({next(width for width in found if width >= NARROW * shape.width), found[-1]})


def _tiled(width: float) -> int:
    return round(width / TILE) * TILE or round(width)


def wanted(shape: Shape, int8: bool) -> Iterator[Form]:
    """What is timed of a shape, of floats or of bytes."""
    yield from ((width, None, int8) for width in widths(shape))
    yield from ((width, rank, int8) for width in _factored(shape) for rank in ranks(shape, width))


Form = tuple[int, int | None, bool]  # width, rank, whether of bytes


def timed(
    forms: Mapping[Shape, Collection[Form]], threads: int, dtype: torch.dtype, progress: Progress | None = None
) -> dict[str, float]:
    """Milliseconds of every form of every shape by name: from this machine's file, or measured and kept there."""
    word = str(dtype).removeprefix("torch.")
    known = times_file.read(threads)
    names = {shape: {shape.named(*form, word): form for form in own} for shape, own in forms.items()}
    total, done = sum(len(own) for own in names.values()), 0
    for shape, own in names.items():
        missing = [name for name in own if name not in known]
        if missing:
            # One curve in one race: what matters is how its points compare.
            runs = {name: specimen(shape, *own[name], dtype) for name in missing}
            known |= clock.race(runs, threads)
            times_file.add(threads, {name: known[name] for name in missing})
        done += len(own)
        if progress is not None:
            progress(done, total)
    return {name: known[name] for own in names.values() for name in own}
