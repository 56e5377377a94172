"""Which modules a model's answer depends on: one run, one gradient, no weight touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.data.batches import call, tensors_in
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.copies import no_graphs_left


def reached(
    model: nn.Module, modules: Mapping[str, nn.Module], image: Any, pick: Callable[[Any], Any] = lambda answer: answer
) -> dict[str, bool]:
    """The modules that are called, by name, and whether a gradient of what is picked of the answer arrives at each."""
    made: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            first = next(tensors_in(output), None)
            leaves = made.setdefault(name, [])
            if first is None or not first.is_floating_point():
                return None
            leaf = torch.zeros_like(first, requires_grad=True)  # followed also where all parameters are frozen
            leaves.append(leaf)
            return first + leaf if output is first else replaced(output, first, first + leaf)

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(no_graphs_left(model))
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(watch(name)).remove)
        with torch.enable_grad():
            answers = [t for t in tensors_in(pick(call(model, image))) if t.is_floating_point() and t.requires_grad]
            leaves = [leaf for own in made.values() for leaf in own]
            given: tuple[Tensor | None, ...] = (None,) * len(leaves)
            if answers and leaves:
                total = torch.stack([t.float().sum() for t in answers]).sum()
                given = torch.autograd.grad(total, leaves, allow_unused=True)
    arrived = {id(leaf) for leaf, g in zip(leaves, given, strict=True) if g is not None}
    return {name: any(id(leaf) in arrived for leaf in own) for name, own in made.items()}


def replaced(output: Any, old: Tensor, new: Tensor) -> Any:
    """A tuple with one of its tensors replaced; None for anything else, which then stays as it is."""
    if not isinstance(output, tuple) or hasattr(output, "_fields"):
        return None
    return tuple(new if item is old else item for item in output)


def changes(
    model: nn.Module, module: nn.Module, image: Any, pick: Callable[[Any], Any] = lambda answer: answer
) -> bool:
    """Whether the answer changes with what the module returns."""

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        first = next(tensors_in(output), None)
        if first is None or not first.is_floating_point():
            return None
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
        changed = first + noise * (first.abs().mean() + 1)
        return changed if output is first else replaced(output, first, changed)

    before = runs(model, image, pick)
    handle = module.register_forward_hook(disturb)
    try:
        after = runs(model, image, pick)
    finally:
        handle.remove()
    return before is None or after is None or any(not torch.equal(a, b) for a, b in zip(before, after, strict=False))


def runs(model: nn.Module, image: Any, pick: Callable[[Any], Any] = lambda answer: answer) -> list[Tensor] | None:
    """The tensors of the model's answer; None where it cannot be run on the image."""
    try:
        with evaluation_mode(model), torch.no_grad():
            return list(tensors_in(pick(call(model, image))))
    except Exception:  # whatever a forward raises
        return None
