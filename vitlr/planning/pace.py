"""How long a model's layers take on this machine, in every form that a plan may give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitlr.anatomy.mlps import Mlp
from vitlr.anatomy.reading import Parts, read
from vitlr.calibration.options import RANGES
from vitlr.calibration.statistics import Statistics
from vitlr.data.batches import noise_images
from vitlr.errors import InputError
from vitlr.measuring import clock, times
from vitlr.measuring.specimens import Shape, is_specimen
from vitlr.measuring.times import Times
from vitlr.nn import (
    FusedAttention,
    FusedBiasedAttention,
    FusedProjections,
    FusedRotaryAttention,
    LowRankLinear,
    LowRankMLP,
    NamedLowRankMLP,
)
from vitlr.nn._fused import with_children
from vitlr.nn._fused_mlp import activation_name
from vitlr.planning.options import Planning
from vitlr.runtime import processes
from vitlr.runtime.copies import duplicate
from vitlr.runtime.modules import device_of, like, swap, uncompiled
from vitlr.runtime.progress import Progress


@dataclass(frozen=True)
class Pace:
    """The times of shapes, and the shape that each linear has, alone or with the whole MLP that it is half of."""

    times: Times
    shapes: Mapping[str, Shape]

    def ms(self, name: str, sizes: tuple[int, int], width: int | None, rank: int | None, int8: bool) -> float:
        """Milliseconds of a linear of these sizes (N, K) where its MLP has this width.

        In an MLP that is one operation each linear counts half of what the MLP takes where both have its form: that is
        what it takes where they differ, as the products of both come to as many.
        """
        shape = self.shapes[name]
        if self.is_half(name):
            return self.times.ms(shape, width or shape.width, rank, int8) / 2
        at = 0 if shape.narrows is None else sizes[1 - shape.narrows]
        return self.times.ms(shape, at, rank, int8)

    def is_half(self, name: str) -> bool:
        """Whether a linear is half of an MLP that is one operation."""
        return len(self.shapes[name].sizes) == 3


def clocked(model: nn.Module, stats: Statistics, options: Planning, *, progress: Progress | None = None) -> Times:
    """Measure what a plan under a budget of milliseconds needs to know, or read it where this machine's file has it.

    The dense model is run as `fuse` leaves it, in its own dtype, for `options.batch_size` images on `options.threads`;
    that is always measured anew. Raises `InputError` for a model elsewhere than on the CPU, and for more threads than
    there are cores.
    """
    model = uncompiled(model)
    check_machine(model, options)
    threads, dtype = clock.check_threads(options.threads), like(model).dtype
    precisions = (False, True) if RANGES in stats.extras else (False,)
    shapes = set(shapes_of(read(model), stats, options.images_a_batch).values())
    forms = {shape: [form for int8 in precisions for form in times.wanted(shape, int8)] for shape in shapes}
    measured = times.timed(forms, threads, dtype, progress)
    inputs = noise_images(model, stats.image, options.images_a_batch)
    whole = clock.race({"dense": (_as_fused(model), inputs)}, threads)["dense"]
    return Times(options.images_a_batch, threads, str(dtype).removeprefix("torch."), whole, measured)


def check_machine(model: nn.Module, options: Planning) -> None:
    """Raise `InputError` unless the model is where times are measured, and the threads are there."""
    clock.check_threads(options.threads)
    if processes.world() > 1:
        raise InputError(
            "milliseconds are measured where nothing else runs, not beside other processes; keep the statistics of "
            "this run in a file and plan from it by one process, or give a budget such as macs:50%"
        )
    if device_of(model).type != "cpu":
        raise InputError(
            f"the model is on {device_of(model)}, and a budget of milliseconds is measured on the CPU: move it there, "
            "or give a budget such as macs:50%"
        )


def check_times(given: Times | None, options: Planning) -> None:
    """Raise `InputError` for times that were measured for another batch, or on other threads."""
    asked = (options.images_a_batch, clock.check_threads(options.threads))
    if given is not None and (given.batch_size, given.threads) != asked:
        raise InputError(
            f"these times are of {given.batch_size} images on {given.threads} threads, the plan is for {asked[0]} on "
            f"{asked[1]}; leave times= out"
        )


def shapes_of(parts: Parts, stats: Statistics, batch_size: int) -> dict[str, Shape]:
    """The shape of every linear that was measured, by name."""
    found: dict[str, Shape] = {}
    for mlp in parts.mlps_among(stats.layers).values():
        found |= _of_mlp(mlp, stats, batch_size)
    packed = {a.queries_keys[0] for a in parts.query_keys.values() if len(a.queries_keys) == 1}
    for name, layer in stats.layers.items():
        if name not in found:
            found[name] = _linear(parts.linears[name], _rows(layer, stats, batch_size), 1 if name in packed else None)
    return found


def _of_mlp(mlp: Mlp, stats: Statistics, batch_size: int) -> dict[str, Shape]:
    *first, second = mlp.linears
    rows = _rows(stats.layers[second], stats, batch_size)
    if (act := _act_of_one_operation(mlp)) is not None:
        fc1, fc2 = mlp.fc1[0], mlp.fc2
        sizes = (int(fc1.in_features), mlp.width, int(fc2.out_features))  # type: ignore[arg-type]
        bias = fc1.bias is not None and fc2.bias is not None
        return dict.fromkeys(mlp.linears, Shape(sizes, rows, 1, act, bias))
    shapes = {name: _linear(linear, rows, 1) for name, linear in zip(first, mlp.fc1, strict=True)}
    return {**shapes, second: _linear(mlp.fc2, rows, 0)}


def _act_of_one_operation(mlp: Mlp) -> str | None:
    """The activation of an MLP that `fuse` makes one module of where its linears are of low rank; None of others.

    Nor of one whose kind cannot be timed.
    """
    names = (*mlp.first, mlp.second)
    if mlp.packed or len(names) != 2 or any("." in name for name in names):
        return None
    trial = with_children(mlp.module, {name: LowRankLinear(2, 2, 1, device="meta") for name in names})
    kind = next((kind for kind in (LowRankMLP, NamedLowRankMLP) if kind.why_not(trial) is None), None)
    if kind is None:
        return None
    act = activation_name(mlp.module.get_submodule(kind.children_of(trial)[1]))
    return act if is_specimen(act) else None


def _linear(linear: nn.Module, rows: int, narrows: int | None) -> Shape:
    K, N = int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]
    return Shape((K, N), rows, narrows, bias=linear.bias is not None)


def _rows(layer: Any, stats: Statistics, batch_size: int) -> int:
    return max(round(batch_size * layer.tokens / max(stats.images, 1)), 1)


def _as_fused(model: nn.Module) -> nn.Module:
    """A copy of a dense model as `fuse` leaves it: nothing but its attentions become one operation."""
    model = duplicate(model)
    for name, module in list(model.named_modules()):
        for kind in (FusedAttention, FusedRotaryAttention, FusedProjections, FusedBiasedAttention):
            if name and kind.why_not(module) is None:
                swap(model, name, kind(module))
    return model
