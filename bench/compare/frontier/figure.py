"""The figure of the frontier: accuracy against megabytes, a panel a model, legible on black and on white."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GREY = "#808080"  # of axes and words: legible on black and on white
FAMILIES = {  # what a row's name begins with: its colour, mark and line
    "vitlr refined": ("#e8590c", "D", "-"),
    "vitlr mixed": ("#d6336c", "s", "-"),
    "vitlr bits": ("#e03131", "o", "-"),
    "NNCF": ("#1c7ed6", "^", ""),
    "HQQ": ("#2f9e44", "v", ""),
    "torchao": ("#9c36b5", "P", ""),
    "nearest": (GREY, "x", ""),
}


def draw(body: dict[str, Any], path: Path) -> None:
    """Write an SVG whose words are text, of no fixed font, on no background."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    style = {"svg.fonttype": "none", "svg.hashsalt": "frontier", "font.family": "sans-serif", "font.size": 9}
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY)
    with matplotlib.rc_context(style):
        figure, panels = plt.subplots(1, len(body), figsize=(4.6 * len(body), 3.4), squeeze=False, layout="constrained")
        for axes, of in zip(panels[0], body.values(), strict=True):
            key = of["key"]
            rows = [row for row in of["rows"] if not row["name"].startswith("dense")]
            for family, (colour, mark, line) in FAMILIES.items():
                of_it = sorted((row["bytes"] / 1e6, row) for row in rows if row["name"].startswith(family))
                if of_it:
                    x, y = [size for size, _ in of_it], [row[key] for _, row in of_it]
                    spread = [
                        [row[key] - row[f"{key}_low"] for _, row in of_it],
                        [row[f"{key}_high"] - row[key] for _, row in of_it],
                    ]
                    axes.errorbar(
                        x,
                        y,
                        spread,
                        color=colour,
                        marker=mark,
                        ls=line or "none",
                        ms=5,
                        lw=1.5,
                        elinewidth=0.6,
                        label=family,
                    )
            for row in of["rows"]:
                if row["name"].startswith("dense"):
                    axes.axhline(row[key], color=GREY, lw=0.8, ls=":")
            axes.set(xscale="log", xlabel="MB of the file", ylabel=of["figures"][key][0], title=of["title"])
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(color=GREY, alpha=0.25, lw=0.5)
            axes.legend(frameon=False, fontsize=8, loc="lower right")
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)
