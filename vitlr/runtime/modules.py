"""Modules in their places, and what a module is called and lives on."""

from __future__ import annotations

import torch
from torch import nn


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Set the module called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def swap(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in place of the module called `name`, under every name that it is registered by."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                setattr(parent, child, new)


def join(name: str, child: str) -> str:
    """Return the qualified name of `child` in the module `name` ("" is the model itself)."""
    return f"{name}.{child}" if name else child


def class_of(module: nn.Module) -> str:
    """The full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
