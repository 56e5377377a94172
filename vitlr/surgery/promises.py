"""Promises of time: what a plan takes is tried before it is carried out, and measured once it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from vitlr.calibration.statistics import Statistics
from vitlr.data.batches import noise_images
from vitlr.decomposition.byte_steps import byte_inputs
from vitlr.errors import InputError
from vitlr.measuring import clock
from vitlr.measuring.specimens import bytes_like
from vitlr.nn import LowRankLinear
from vitlr.planning.budgets import LATENCY, Budget
from vitlr.planning.latency import Latency
from vitlr.planning.plans import Plan
from vitlr.runtime.modules import swap
from vitlr.surgery.application import apply
from vitlr.surgery.fusion import fuse

NEAR = 0.02  # so near to its promise a plan needs no correction


def corrected(model: nn.Module, plan: Plan, goal: Budget, again: Callable[[Budget], Plan]) -> Plan:
    """The plan, or where it takes another time than the table says, the one that `again` makes of what the goal leaves.

    A layer alone takes another time than within a model, whose other layers take the cache: one ratio makes up for it.
    """
    latency = plan.latency
    assert latency is not None
    tried = timed(model, _tried(model, plan), latency, plan.image)
    ratio = 1 + (tried.off or 0.0)
    if abs(ratio - 1) <= NEAR:
        return plan
    try:
        better = again(Budget(LATENCY, goal.limit(latency.dense_ms) / ratio, relative=False))
    except InputError:  # out of reach as it turns out: the nearest to it is what there is, and is said to be off
        return plan
    assert better.latency is not None
    promised = round(better.latency.promised_ms * ratio, 4)
    return replace(better, latency=replace(better.latency, promised_ms=promised, correction=round(ratio, 4)))


def timed(dense: nn.Module, small: nn.Module, latency: Latency, image: object) -> Latency:
    """What both take as `fuse` leaves them, in turns, beside what was promised."""
    runs = {"dense": fuse(dense), "small": fuse(small)}
    inputs = noise_images(dense, image, latency.batch_size)
    found = clock.race({name: (model, inputs) for name, model in runs.items()}, latency.threads)
    return latency.measured(found["dense"], found["small"])


def bytes_names(model: nn.Module, plan: Plan) -> list[str]:
    """The linears of a model that was made by a plan which are to multiply bytes: of one of low rank both."""
    found = []
    for name in plan.bytes_layers:
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
