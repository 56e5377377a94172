"""A run on one image that proves what was put in: it is called, and the model's answer depends on it."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from torch import nn

from vitlr.errors import InputError
from vitlr.measuring.reach import changes, reached, runs
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
            depends[name] = changes(model, modules[name], image)  # a forward under no_grad, or with detach in it
    except Exception as cause:  # whatever a forward raises
        if original is not None and runs(original, image) is None:
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
