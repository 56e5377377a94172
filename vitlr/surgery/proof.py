"""A run on one image that proves what was put in: it is called, and the model's answer depends on it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.data.batches import call, tensors_in
from vitlr.errors import InputError
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.copies import no_graphs_left
from vitlr.runtime.words import one_line, some

_logger = logging.getLogger(__name__)


def prove(model: nn.Module, names: Collection[str], image: Any, original: nn.Module | None = None) -> None:
    """Run `model` on one image (a batch of one); `InputError` unless every module named is called and counts.

    That is: a gradient of the answer reaches what it returned, or the answer changes with it. Where the `original`
    cannot be run on the image either, nothing is proven, and a warning says so.
    """
    if not names:
        return
    modules = {name: model.get_submodule(name) for name in names}
    try:
        made, depends = _run(model, modules, image)
    except Exception as cause:  # whatever a forward raises
        if original is not None and _runs(original, image) is None:
            _logger.warning("the result could not be tried on an image: %s", one_line(cause))
            return
        raise InputError(
            f"the model does not run with its new modules ({type(cause).__name__}: {one_line(cause)}); leave out what "
            "it reads otherwise than by calling it, with exclude="
        ) from cause
    uncalled = [name for name in modules if name not in made]
    if uncalled:
        raise InputError(
            f"{len(uncalled)} of {len(modules)} new modules are not called ({some(uncalled)}): the model's forward "
            "belongs to another copy of it, or reads past them; take wrappers off, or leave these out with exclude="
        )
    idle = [name for name in modules if not depends[name]]
    if idle:
        raise InputError(
            f"{len(idle)} of {len(modules)} new modules are called, and the answer does not depend on them "
            f"({some(idle)}); leave them out with exclude="
        )


def _run(model: nn.Module, modules: Mapping[str, nn.Module], image: Any) -> tuple[dict[str, Any], dict[str, bool]]:
    """What the modules returned, and whether the answer depends on it."""
    made: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            first = next(tensors_in(output), None)
            if first is None or not first.is_floating_point():
                made.setdefault(name, [])
                return None
            # What an own leaf adds is followed also where all parameters are frozen.
            leaf = torch.zeros_like(first, requires_grad=True)
            made.setdefault(name, []).append(leaf)
            return first + leaf if output is first else _with(output, first, first + leaf)

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(no_graphs_left(model))
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(watch(name)).remove)
        with torch.enable_grad():
            answers = [t for t in tensors_in(call(model, image)) if t.is_floating_point() and t.requires_grad]
            flat = [leaf for leaves_of in made.values() for leaf in leaves_of]
            given: tuple[Tensor | None, ...] = (None,) * len(flat)
            if answers and flat:
                total = torch.stack([t.float().sum() for t in answers]).sum()
                given = torch.autograd.grad(total, flat, allow_unused=True)
        reached = {id(leaf) for leaf, g in zip(flat, given, strict=True) if g is not None}
    depends = {name: any(id(leaf) in reached for leaf in made.get(name, ())) for name in modules}
    for name in [name for name in made if not depends[name]]:  # a forward under no_grad or with detach in it
        depends[name] = not made[name] or _changes(model, modules[name], image)
    return made, depends


def _changes(model: nn.Module, module: nn.Module, image: Any) -> bool:
    """Whether the answer changes with what the module returns."""

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        first = next(tensors_in(output))
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
        changed = first + noise * (first.abs().mean() + 1)
        return changed if output is first else _with(output, first, changed)

    before = _runs(model, image)
    handle = module.register_forward_hook(disturb)
    try:
        after = _runs(model, image)
    finally:
        handle.remove()
    return before is None or after is None or any(not torch.equal(a, b) for a, b in zip(before, after, strict=False))


def _runs(model: nn.Module, image: Any) -> list[Tensor] | None:
    """The tensors of the model's answer; None where it cannot be run on the image."""
    try:
        with evaluation_mode(model), torch.no_grad():
            return list(tensors_in(call(model, image)))
    except Exception:  # whatever a forward raises
        return None


def _with(output: Any, old: Tensor, new: Tensor) -> Any:
    """A tuple with one of its tensors replaced; anything else as it is."""
    if not isinstance(output, tuple) or hasattr(output, "_fields"):
        return None
    return tuple(new if item is old else item for item in output)
