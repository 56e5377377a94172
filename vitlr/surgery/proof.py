"""A run on one image that proves what was put in: it is called, and the model's answer depends on it."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.data.batches import call, tensors_in
from vitlr.errors import InputError
from vitlr.measuring.reach import reached, replaced
from vitlr.runtime.contexts import evaluation_mode
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
        depends = reached(model, modules, image)
        for name in [name for name, found in depends.items() if not found]:
            depends[name] = _changes(model, modules[name], image)  # a forward under no_grad, or with detach in it
    except Exception as cause:  # whatever a forward raises
        if original is not None and _runs(original, image) is None:
            _logger.warning("the result could not be tried on an image: %s", one_line(cause))
            return
        raise InputError(
            f"the model does not run with its new modules ({type(cause).__name__}: {one_line(cause)}); leave out what "
            "it reads otherwise than by calling it, with exclude="
        ) from cause
    uncalled = [name for name in modules if name not in depends]
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


def _changes(model: nn.Module, module: nn.Module, image: Any) -> bool:
    """Whether the answer changes with what the module returns."""

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        first = next(tensors_in(output), None)
        if first is None or not first.is_floating_point():
            return None
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first)
        changed = first + noise * (first.abs().mean() + 1)
        return changed if output is first else replaced(output, first, changed)

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
