"""Which hidden moments are measured: those of the MLPs and attentions that may get narrower, if memory allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from vitlr.anatomy.attention import measurable, nothing, score_attentions
from vitlr.anatomy.mlps import SUPPORTED, find_mlps, refused_mlps
from vitlr.calibration.options import HIDDEN, QUERIES, VALUES, Calibration
from vitlr.calibration.statistics import Statistics
from vitlr.errors import InputError


def hidden_layers(
    model: nn.Module, targets: Mapping[str, nn.Linear], wanted: Calibration, stats: Statistics | None
) -> tuple[tuple[str, ...], dict[str, int], str]:
    """All extras, the linears whose whole input moment narrowing needs, and why there are none where none were had.

    `InputError` where what was asked for cannot be measured or takes too much.
    """
    asked: tuple[str, ...] = (HIDDEN, VALUES) if wanted.hidden == "attention" else (HIDDEN,) if wanted.hidden else ()
    if wanted.hidden is None and stats is not None:
        asked = tuple(extra for extra in (HIDDEN, VALUES, QUERIES) if extra in stats.extras)
    if wanted.hidden is None and stats is None and set(wanted.objectives) != {"normalized"}:  # has a unit of its own
        try:
            return *_widths(model, targets, wanted, (HIDDEN,)), ""
        except InputError as cause:
            alone = (QUERIES,) if not find_mlps(model) and score_attentions(model, targets) else ()
            return *_widths(model, targets, wanted, alone), str(cause)
    return *_widths(model, targets, wanted, asked), ""


def _widths(
    model: nn.Module, targets: Mapping[str, nn.Linear], wanted: Calibration, asked: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The extras with those asked for, and the width of every linear whose whole input moment they need."""
    extras = tuple(dict.fromkeys((*wanted.extras, *asked)))
    widths: dict[str, int] = {}
    if HIDDEN in extras:
        mlps = find_mlps(model).values()
        widths = {mlp.linears[-1]: mlp.width for mlp in mlps if set(mlp.linears) <= set(targets)}
        if not widths and VALUES not in extras:
            reasons = [f"{name}: {reason}" for name, reason in refused_mlps(model).items()]
            why = reasons[0] if reasons else f"none is of a form that is known ({SUPPORTED})"
            raise InputError(f"hidden=True finds no MLP whose width could change among the measured layers; {why}")
    what = [f"{len(widths)} MLPs"] if widths else []
    if VALUES in extras:
        found, refused = measurable(model, targets)
        if not found:
            raise InputError(nothing(model, refused))
        widths |= {attention.output: attention.width for attention in found.values()}
        what.append(f"{len(found)} attentions")
    taken = sum(8 * width**2 for width in widths.values()) * (2 if "fisher" in wanted.objectives else 1)
    if taken > wanted.hidden_memory:
        raise InputError(
            f"the hidden moments of {' and '.join(what)} take {taken:,} bytes, more than "
            f"hidden_memory={wanted.hidden_memory:,.0f}; raise it, or measure fewer of them (include=, exclude=)"
        )
    return extras, widths
