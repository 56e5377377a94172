"""Promises of time: what a plan takes is tried before it is carried out, and measured once it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from vitlr.calibration.statistics import Statistics
from vitlr.data.batches import noise_images
from vitlr.decomposition.byte_steps import byte_inputs
from vitlr.errors import InputError
from vitlr.measuring import clock
from vitlr.measuring.specimens import bytes_like
from vitlr.nn import LowRankLinear, SelectedLinear
from vitlr.planning.budgets import LATENCY, Budget, OutOfReach
from vitlr.planning.latency import Latency
from vitlr.planning.plans import Plan
from vitlr.runtime.modules import swap
from vitlr.surgery.application import apply
from vitlr.surgery.fusion import fuse

NEAR = 0.02  # so near to its promise a plan needs no correction
TRIES = 2


def corrected(model: nn.Module, plan: Plan, goal: Budget, again: Callable[[Budget], Plan]) -> Plan:
    """The plan, or where it takes another time than the table says, the one that `again` makes of what the goal leaves.

    A layer alone takes another time than within a model, whose other layers take the cache, and what lies between the
    layers takes another time in a block of bytes than in the dense model. One plan tried gives a ratio, which the next
    one is made by; two that were tried give a line.
    """
    seen: list[tuple[float, float]] = []  # what the table said, and what it took
    for _ in range(TRIES):
        latency = plan.latency
        assert latency is not None
        tried = timed(model, _tried(model, plan), latency, plan.image)
        took = latency.promised_ms * (1 + (tried.off or 0.0))
        if abs(took / latency.promised_ms - 1) <= NEAR:
            return plan
        seen.append((latency.promised_ms / latency.correction, took))
        slope, start = _line(seen)
        try:
            better = again(Budget(LATENCY, (goal.limit(latency.dense_ms) - start) / slope, relative=False))
        except InputError:  # out of reach as it turns out: the nearest to it is what there is, and is said to be off
            return plan
        assert better.latency is not None
        said = better.latency.promised_ms
        promised = start + slope * said
        latency = replace(better.latency, promised_ms=round(promised, 4), correction=round(promised / said, 4))
        plan = replace(better, latency=latency)
    return plan


def _line(seen: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and start of what plans take over what the table says: by the last two, or by one and through nothing."""
    said, took = seen[-1]
    if len(seen) > 1:
        before, had = seen[-2]
        if said != before and 0.5 <= (slope := (took - had) / (said - before)) <= 2.0:
            return slope, took - slope * said
    return took / said, 0.0


def within_reach(model: nn.Module, goal: Budget, again: Callable[[Budget], Plan], cause: OutOfReach) -> Plan:
    """The plan for a goal that the table holds for out of reach, where the smallest plan takes less than it says.

    In a block of bytes what lies between the layers takes less time than in the dense model, whose it is in the table.
    Raises `cause` where the goal is out of reach all the same.
    """
    found = corrected(model, again(Budget(LATENCY, 1.000001 * cause.least, relative=False)), goal, again)
    assert found.latency is not None
    if found.latency.promised_ms > goal.limit(found.latency.dense_ms):
        raise cause
    return found


def timed(dense: nn.Module, small: nn.Module, latency: Latency, image: object) -> Latency:
    """What both take as `fuse` leaves them, in turns, beside what was promised."""
    runs = {"dense": fuse(dense), "small": fuse(small)}
    inputs = noise_images(dense, image, latency.batch_size)
    found = clock.race({name: (model, inputs) for name, model in runs.items()}, latency.threads)
    return latency.measured(found["dense"], found["small"])


def bytes_names(model: nn.Module, plan: Plan) -> list[str]:
    """The linears of a model that was made by a plan which are to multiply bytes: of one of low rank both.

    Of one that lost queries and keys the linear of those that are left.
    """
    found = []
    for name in plan.bytes_layers:
        name += ".linear" * isinstance(model.get_submodule(name), SelectedLinear)
        low = isinstance(model.get_submodule(name), LowRankLinear)
        found += [f"{name}.down", f"{name}.up"] if low else [name]
    return found


@torch.no_grad()
def multiply_planned(model: nn.Module, stats: Statistics) -> None:
    """Put an `Int8Linear` in place of every linear that `stats` measured, in place: the plan has weighed them all."""
    for name, inputs in byte_inputs(dict(model.named_modules()), stats.layers).items():
        swap(model, name, inputs.layer().train(inputs.linear.training))


def _tried(model: nn.Module, plan: Plan) -> nn.Module:
    """A model that takes the time that the plan's will take, with any bytes where it multiplies bytes."""
    small = apply(model, plan)
    for name in bytes_names(small, plan):
        linear = small.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        swap(small, name, bytes_like(linear.in_features, linear.out_features).train(linear.training))
    return small
