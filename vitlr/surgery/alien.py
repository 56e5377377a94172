"""What other libraries' own ways of saving would do to a compressed model, and that it is said."""

from __future__ import annotations

import logging
import types
from typing import Any

from torch import nn

from vitlr.anatomy.attention import fewer_heads
from vitlr.anatomy.mlps import narrower_mlps
from vitlr.errors import InputError

_logger = logging.getLogger(__name__)
_SAVE = "save_pretrained"  # of transformers


def guard(model: nn.Module) -> None:
    """Let `save_pretrained` of a compressed model refuse: `from_pretrained` would make a dense one of it, half random.

    With `state_dict=`, as its Trainer calls it for checkpoints, it writes, and says that only that reads it.
    """
    for module in model.modules():
        if callable(getattr(type(module), _SAVE, None)):
            module.__dict__[_SAVE] = types.MethodType(_save_pretrained, module)


def unguard(model: nn.Module) -> None:
    """Undo `guard`, for a model that is dense again and as wide as it was."""
    if narrower_mlps(model) or fewer_heads(model):
        return
    for module in model.modules():
        module.__dict__.pop(_SAVE, None)


def _save_pretrained(self: nn.Module, save_directory: Any, *args: Any, **options: Any) -> Any:
    if options.get("state_dict") is None:
        raise InputError(
            "save_pretrained writes no compressed model: from_pretrained would read it as a dense one with random "
            "weights, and refuse one whose MLPs are narrower; use vitlr.save and vitlr.load(path, model=), or "
            "save_pretrained of vitlr.to_dense(model, full_width=True)"
        )
    _logger.warning("from_pretrained cannot read the compressed model in %s; load_state_dict of it can", save_directory)
    return getattr(type(self), _SAVE)(self, save_directory, *args, **options)
