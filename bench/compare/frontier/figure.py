"""The figure of the frontier: accuracy against megabytes, a panel a model, legible on black and on white."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GREY = "#808080"  # of axes and words: legible on black and on white
TICKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)  # MB
DENSE = "dense"
FAMILIES = {  # what a row's name begins with: its colour, mark and line; the last lie on top
    "nearest": (GREY, "x", ""),
    "torchao": ("#9c36b5", "P", ""),
    "HQQ": ("#2f9e44", "v", ""),
    "NNCF": ("#1c7ed6", "^", ""),
    "vitlr bits": ("#e03131", "o", "-"),
    "vitlr mixed": ("#e64980", "s", "-"),
    "vitlr refined": ("#f08c00", "D", "-"),
}


def style(salt: str) -> dict[str, Any]:
    """Words as text, in grey; the same file from the same figures."""
    words = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    fonts = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif", "font.size": 9}
    return {**fonts, **dict.fromkeys(words, GREY)}


def draw(body: dict[str, Any], path: Path) -> None:
    """Write an SVG on no background, whose words are text in whatever font there is."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    with matplotlib.rc_context(style("frontier")):
        size = (4.6 * len(body), 3.4)
        figure, panels = plt.subplots(1, len(body), figsize=size, squeeze=False, layout="constrained")
        for axes, of in zip(panels[0], body.values(), strict=True):
            _panel(axes, of)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


def _panel(axes: Any, of: dict[str, Any]) -> None:
    """One model's rows; those below its floor are in the table only."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    key, above = of["key"], [row for row in of["rows"] if row[of["key"]] >= of["floor"]]
    for family, (colour, mark, line) in FAMILIES.items():
        rows = sorted((row for row in above if row["name"].startswith(family)), key=lambda row: row["bytes"])
        if rows:
            look = {"color": colour, "marker": mark, "ls": line or "none", "ms": 4.5, "lw": 1.5, "elinewidth": 0.5}
            sizes, values = [row["bytes"] / 1e6 for row in rows], [row[key] for row in rows]
            spread = [[row[key] - row[f"{key}_low"] for row in rows], [row[f"{key}_high"] - row[key] for row in rows]]
            axes.errorbar(sizes, values, spread, label=family, **look)
    for row in above:
        if row["name"].startswith(DENSE):
            axes.axhline(row[key], color=GREY, lw=0.8, ls=":", label=f"dense, {row['bytes'] / 1e6:.1f} MB")
    axes.set(xscale="log", xlabel="MB of the file", ylabel=of["figures"][key][0], title=of["title"])
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color=GREY, alpha=0.25, lw=0.5)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
