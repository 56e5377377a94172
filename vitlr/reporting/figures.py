"""The figures: accuracy against bytes and time, where a plan's budget went, and spectra with what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitlr.planning.options import ROUNDED
from vitlr.planning.plans import LayerPlan, Plan
from vitlr.reporting.advice import WORDS, key_of
from vitlr.reporting.drawing import COLOURS, GREY, by_block, drawn, megabytes, plain
from vitlr.reporting.layers import by_kind
from vitlr.reporting.rows import INT8, PLAIN, VITLR, Row

# How far into the model a layer is, (rank, error) from 0 on, the full rank, and the one chosen.
Curve = tuple[float, Sequence[tuple[int, float]], int, "int | None"]
MOST = 1e30  # of a predicted loss: beyond, axes overflow
BITS = "bits"
MARKS = {  # of each sort of rows: its name, colour, mark and line
    BITS: ("vitlr, rounded", COLOURS[1], "o", "-"),
    VITLR: ("vitlr, ranks and widths", COLOURS[3], "s", "-"),
    INT8: ("vitlr, multiplying bytes", COLOURS[0], "P", "none"),
    PLAIN: ("plain rounding", GREY, "X", "none"),
}


def draw_frontier(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against megabytes, and against milliseconds where they were measured."""
    key, dense = key_of(rows), rows[0]
    timed = [row for row in rows if row.ms is not None]
    with drawn(path, 9.2 if timed else 4.8, 3.6, 2 if timed else 1, shared=True) as panels:
        for axes, of, unit in zip(panels, ("bytes", "ms"), (1e6, 1.0), strict=False):
            for kind, (label, colour, mark, line) in MARKS.items():
                some = [row for row in rows if sort(row) == kind and getattr(row, of) is not None]
                some = sorted(some, key=lambda row: getattr(row, of))
                if some:
                    x, y = [getattr(row, of) / unit for row in some], [getattr(row, key) for row in some]
                    spread = [[row.top1 - row.top1_low, row.top1_high - row.top1] for row in some if key == "top1"]  # type: ignore[operator]
                    look = {"color": colour, "marker": mark, "ls": line if of == "bytes" else "none", "ms": 5}
                    errors = [list(side) for side in zip(*spread, strict=True)] if spread else None
                    axes.errorbar(x, y, errors, label=label, elinewidth=0.5, lw=1.5, **look)
            axes.axhline(getattr(dense, key), color=GREY, lw=0.8, ls=":", label=f"dense, {dense.bytes / 1e6:.1f} MB")
            if of == "ms":
                axes.axvline(dense.ms, color=GREY, lw=0.8, ls=":")
                axes.set(xlabel="ms of one image, fused", xlim=(0, None))
            else:
                axes.set(ylabel=WORDS[key] + ("" if key == "cosine" else ", %"))
                megabytes(axes)
                axes.legend(frameon=False, fontsize=8, loc="lower right")


def sort(row: Row) -> str:
    """What a row is drawn as."""
    return BITS if row.kind == VITLR and row.method in ROUNDED else row.kind


def draw_kept(plan: Plan, path: Path) -> None:
    """Where the budget went: of every linear's weights, how much is kept, block by block."""
    lines = by_kind(plan.layers)
    with drawn(path, 7.5, 3.2) as (axes,):
        for index, (kind, rows) in enumerate(lines.items()):
            x, y = [place for place, _ in rows], [100 * share(plan, row) for _, row in rows]
            axes.plot(x, y, color=COLOURS[index % len(COLOURS)], marker="o", ms=3.5, lw=1.3, label=plain(kind))
        what = "bits in the file" if plan.levels else "weights"
        axes.set(ylabel=f"{what} kept, %", ylim=(0, None))
        by_block(axes)


def draw_losses(plan: Plan, path: Path) -> None:
    """What is lost where, as predicted: a bar a block, a colour a kind of layer, widths on top."""
    lines = by_kind([*plan.layers, *plan.widths])
    with drawn(path, 7.5, 3.0) as (axes,):
        heights: dict[Any, float] = {}
        for index, (kind, rows) in enumerate(lines.items()):
            places = [place for place, _ in rows]
            values = [min(max(row.error, 0.0), MOST) for _, row in rows]
            under = [heights.get(place, 0.0) for place in places]
            axes.bar(places, values, bottom=under, color=COLOURS[index % len(COLOURS)], label=plain(kind))
            heights |= {place: a + b for place, a, b in zip(places, under, values, strict=True)}
        axes.set(ylabel="predicted loss", ylim=(0, None))
        by_block(axes)


def draw_spectra(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """What is left undone at every rank, a panel a kind, a line a layer, deeper ones darker; dots where the plan is."""
    with drawn(path, max(2.4 * len(curves), 4.0), 2.8, max(len(curves), 1), shared=True) as panels:
        for index, (axes, (kind, lines)) in enumerate(zip(panels, curves.items(), strict=False)):
            for depth, points, full, chosen in lines:
                first = max(points[0][1], 1e-30)
                left = {rank: max(error / first, 1e-6) for rank, error in points}
                look = {"color": COLOURS[index % len(COLOURS)], "alpha": 0.25 + 0.75 * depth}
                axes.plot([100 * rank / full for rank in left], list(left.values()), lw=1, **look)
                if chosen is not None:
                    axes.plot([100 * chosen / full], [left[chosen]], marker="o", ms=4, **look)
            axes.set(yscale="log", ylim=(1e-4, 1.5), xlabel="rank, % of full", title=plain(kind))
        panels[0].set(ylabel="share of the loss left")


def share(plan: Plan, row: LayerPlan) -> float:
    """Of the layer's dense weights, how much the file keeps: bits where they are rounded, else their number."""
    dense = row.in_features * row.out_features
    if row.level is not None and row.bits is not None:
        return row.params * row.bits / (dense * _width(plan))
    return row.params / dense


def _width(plan: Plan) -> float:
    """Bits of a weight in the dense model."""
    return max(8 * plan.bytes / max(plan.params, 1), 1)
