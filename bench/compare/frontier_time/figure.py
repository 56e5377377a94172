"""The figure of accuracy against milliseconds, a panel a model with weights, legible on black and on white."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.compare.frontier.figure import GREY, style

SIZE = "8"  # images a batch of the figure
FAMILIES = {  # what a row's name begins with: its colour and mark; the last lie on top
    "torch,": (GREY, "x"),
    "torch compiled": (GREY, "+"),
    "torchao": ("#0c8599", "*"),
    "ONNX Runtime": ("#9c36b5", "P"),
    "OpenVINO": ("#2f9e44", "v"),
    "NNCF int8": ("#1c7ed6", "^"),
    "vitlr lowrank": ("#e8590c", "s"),
    "vitlr widths": ("#fab005", "s"),
    "vitlr joint": ("#e64980", "s"),
    "vitlr latency": ("#f08c00", "D"),
    "vitlr int8": ("#e03131", "o"),
}


def draw(body: dict[str, Any], path: Path) -> None:
    """Write an SVG on no background, whose words are text; rows below a model's floor are in the table only."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    judged = [of for of in body.values() if of["key"]]
    if not judged:
        return
    with matplotlib.rc_context(style("frontier_time")):
        size = (4.6 * len(judged), 3.6)
        figure, panels = plt.subplots(1, len(judged), figsize=size, squeeze=False, layout="constrained")
        for axes, of in zip(panels[0], judged, strict=True):
            _panel(axes, of)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


def _panel(axes: Any, of: dict[str, Any]) -> None:
    """One model; hollow marks are our files in OpenVINO."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    key = of["key"]
    above = {n: r for n, r in of["rows"].items() if "times" in r and r["figures"][key] >= of["floor"]}
    for family, (colour, mark) in FAMILIES.items():
        label: str | None = family.rstrip(",")
        for name in [name for name in above if name.startswith(family)]:
            hollow = name.startswith("vitlr") and "OpenVINO" in name
            look = {"color": colour, "marker": mark, "mfc": "none" if hollow else colour, "ms": 5, "ls": "none"}
            axes.plot(above[name]["times"][SIZE]["ms"], above[name]["figures"][key], label=label, **look)
            label = None
    title = f"{of['title']}, batch {SIZE}"
    axes.set(xscale="log", xlabel="ms a batch (hollow: in OpenVINO)", ylabel=of["figures"][key][0], title=title)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GREY, alpha=0.25, lw=0.5)
    axes.legend(frameon=False, fontsize=7)
