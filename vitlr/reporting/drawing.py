"""A figure on no background, whose words are text, in colours that are legible on black and on white."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitlr.errors import InputError

GREY = "#808080"  # of axes and words
COLOURS = ("#1c7ed6", "#e64980", "#2f9e44", "#f08c00", "#9c36b5", "#e03131", "#0c8599", "#74b816")
LONGEST = 40  # letters of a name in a figure
TICKS = (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)  # MB


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def check_drawing() -> None:
    """`InputError` where matplotlib is not there."""
    if not can_draw():
        raise InputError("figures need matplotlib, which is not installed; pip install 'vitlr[figures]'")


@contextmanager
def drawn(path: Path, width: float, height: float, panels: int = 1, shared: bool = False) -> Iterator[list[Any]]:
    """The axes of so many panels side by side, written as SVG (no background) or PNG (white) by the path's name."""
    check_drawing()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from vitlr.runtime.places import atomic_path

    style = {"svg.fonttype": "none", "svg.hashsalt": "vitlr", "font.family": "sans-serif", "font.size": 9}
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY)
    png = path.suffix.lower() == ".png"
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        (FigureCanvasAgg if png else FigureCanvasSVG)(figure)
        axes = figure.subplots(1, panels, squeeze=False, sharey=shared)[0]
        for each in axes:
            each.grid(color=GREY, alpha=0.25, lw=0.5)
            each.set_facecolor("none")
        yield list(axes)
        how: dict[str, Any] = {"format": "png", "dpi": 160, "facecolor": "white"} if png else {"format": "svg"}
        how |= {} if png else {"transparent": True, "metadata": {"Date": None}}
        with atomic_path(path) as temporary:
            figure.savefig(temporary, **how)


def megabytes(axes: Any, label: str = "MB of the file") -> None:
    """A logarithmic axis of bytes with ticks that people read."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axes.set(xscale="log", xlabel=label)
    low, high = axes.get_xlim()
    few = high / low > 60
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if not few or f"{tick:g}"[0] == "1"]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def by_block(axes: Any) -> None:
    """An axis of blocks, with no tick between two of them, and the kinds of layers above, where they hide nothing."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="block")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def plain(text: str) -> str:
    """A name as it is, cut short: matplotlib would set what stands between dollars as a formula."""
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return text.replace("$", r"\$")
