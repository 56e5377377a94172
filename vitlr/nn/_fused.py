"""Modules that stand for another one: what they keep of it, and how it comes back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from vitlr.errors import InputError


class StandIn(nn.Module):
    """A module in the place of another one, its `original`, which `back` gives back."""

    if TYPE_CHECKING:  # TorchScript reads annotations
        original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # past nn.Module, which would register it as a child
        self.training = original.training

    def back(self) -> nn.Module:
        """The original module with the weights of now."""
        raise NotImplementedError


def original_of(module: nn.Module) -> nn.Module:
    """What a module stands for, or the module itself."""
    return module.original if isinstance(module, StandIn) else module


class Fused(StandIn):
    """A module that runs `kept`, the children of the original, which keep their names and are shared with it.

    The keys of state_dict do not change. Raises InputError with the reason of `why_not`.
    """

    if TYPE_CHECKING:
        KEPT: tuple[str, ...]
        kept: tuple[str, ...]

    def __init__(self, module: nn.Module) -> None:
        reason = self.why_not(module)
        if reason is not None:
            raise InputError(f"{type(module).__name__} cannot become a {type(self).__name__}: {reason}")
        kept = self.children_of(module)
        super().__init__(with_children(module, dict.fromkeys(kept)))  # emptied of what it shares with this module
        self.kept = kept
        self._forward_hooks.update(module._forward_hooks)  # those that do not count as hooks
        for name in kept:
            self.add_module(name, getattr(module, name))

    @classmethod
    def children_of(cls, module: nn.Module) -> tuple[str, ...]:
        """The names of the children to keep."""
        return cls.KEPT

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module cannot become one of these with the same outputs; None if it can."""
        raise NotImplementedError

    def back(self) -> nn.Module:
        """The original module, class and all, with the kept children as they are now."""
        module = with_children(self.original, {name: getattr(self, name) for name in self.kept})
        module.training = self.training
        for name, child in module._modules.items():
            if name not in self.kept and child is not None:
                module._modules[name] = copy.deepcopy(child).train(self.training)
        return module


def with_children(module: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    """A shallow copy of a module with some of its children replaced, their order kept."""
    twin = copy.copy(module)
    # Children, hooks, parameters live in dicts: shared ones would make what is done to one appear on the other.
    twin.__dict__.update({name: value.copy() for name, value in vars(module).items() if isinstance(value, dict)})
    twin._modules.update(children)
    return twin
