"""The figure of engines: how near to the dense model against milliseconds, legible on black and on white."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.compare.frontier.figure import GREY, style

FAMILIES = {  # what a row's name begins with: its colour and mark; the last lie on top
    "torch": (GREY, "x"),
    "ONNX Runtime": ("#9c36b5", "P"),
    "OpenVINO": ("#2f9e44", "v"),
    "NNCF int8": ("#1c7ed6", "^"),
    "vitlr int8": ("#e03131", "o"),
}


def draw(rows: Mapping[str, Any], path: Path) -> None:
    """Write an SVG of a panel for each batch size; hollow marks hold bfloat16 for what is no product of bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    timed = {name: row for name, row in rows.items() if "ms" in row}
    sizes = list(next(iter(timed.values()))["ms"])
    with matplotlib.rc_context(style("engines")):
        figure, panels = plt.subplots(
            1, len(sizes), figsize=(4.6 * len(sizes), 3.4), squeeze=False, layout="constrained"
        )
        for axes, size in zip(panels[0], sizes, strict=True):
            _panel(axes, timed, size)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


def _panel(axes: Any, rows: Mapping[str, Any], size: str) -> None:
    """One batch size; every family once in the legend."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    for family, (colour, mark) in FAMILIES.items():
        label: str | None = family
        for name in [name for name in rows if name.startswith(family)]:
            fill = "none" if "bfloat16" in name and mark != "x" else colour
            look = {"color": colour, "marker": mark, "mfc": fill, "ms": 6, "ls": "none", "label": label}
            axes.plot(rows[name]["ms"][size], rows[name]["agreement"], **look)
            label = None
    title = f"ViT-Ti/16, batch {size} (hollow: the rest in bfloat16)"
    axes.set(xscale="log", xlabel="ms a batch", ylabel="agreement with the dense model, %", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GREY, alpha=0.25, lw=0.5)
    axes.legend(frameon=False, fontsize=8)
