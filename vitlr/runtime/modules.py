"""Modules in their places, and what a module is called and lives on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitlr.errors import InputError


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in place of the module called `name`, under that name only."""
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


def like(model: nn.Module) -> Tensor:
    """A tensor on the device and of the dtype that the model's inputs take: its first parameter in floating point."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))


def read_freely(t: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device that runs behind."""
    return t.device.type == "cpu"


def device_of(model: nn.Module) -> torch.device:
    """Where the model lives: the device of its first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` made a compiled one of, or the module itself; `InputError` for what is none."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the model is a {type(model).__name__}, expected a torch.nn.Module; weights and names become one by "
            "vitlr.create_model(NAME, checkpoint=...)"
        )
    inner = None if isinstance(model, torch.jit.ScriptModule) else model._modules.get("_orig_mod")
    return model if inner is None else uncompiled(inner)


def without_compiled_parts(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put what they hold in the place of compiled modules within the model; (parent, name, compiled) of each."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and uncompiled(child) is not child
    ]
    for parent, name, child in found:
        parent._modules[name] = uncompiled(child)
    return found


@contextmanager
def plain_parts(model: nn.Module) -> Iterator[None]:
    """Within it no part of the model is compiled, so that modules go by the names that they have without that."""
    found = without_compiled_parts(model)
    try:
        yield
    finally:
        for parent, name, child in found:
            parent._modules[name] = child


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers that hand on what they get: compiled, data parallel, distributed, averaged."""
    model = uncompiled(model)
    inner = model._modules.get("module") if type(model).__name__ in _WRAPPERS else None
    return model if inner is None else unwrapped(inner)


_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "AveragedModel", "ModelEmaV3")
