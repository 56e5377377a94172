"""Blocks of a transformer that follow each other, all of whose linears multiply bytes, looked at once a call."""

from __future__ import annotations

from collections import OrderedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vitlr.nn._fused import Fused, with_children
from vitlr.nn._plain import has_hooks
from vitlr.nn.int8_block import Int8Block, Known
from vitlr.ops.dispatch.registration import Ready, unwatched

# Beside the modules, which are copied and pickled.
_known: WeakKeyDictionary[Int8Blocks, Known] = WeakKeyDictionary()


class Int8Blocks(Fused, nn.Sequential):
    """`block[n](… block[1](block[0](x)))`: an `nn.Sequential` of `Int8Block`s.

    Whether every block may still run as its two operations is looked at before the first one, for all of them: between
    products of megabytes of weights, code and objects would have to come from memory for every single one. Where
    somebody listens to anything below, a block is of another class, or one would call its children, they are called one
    by one. Children keep their names.
    Raises InputError with the reason of `why_not`.
    """

    @classmethod
    def children_of(cls, module: nn.Module) -> tuple[str, ...]:
        """All of them."""
        return tuple(module._modules)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module cannot become one of these with the same outputs, or gains nothing by it; None if it can."""
        if isinstance(module, cls):
            return "it is one already"
        if type(module) is not nn.Sequential:
            return f"{type(module).__qualname__} is not exactly nn.Sequential"
        if len(module) < 2 or not all(type(child) is Int8Block for child in module):
            return "its children are not two Int8Blocks or more"
        return "it has parameters of its own, or hooks" if vars(module)["_parameters"] or has_hooks(module) else None

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._called(input)
        return self._dispatched(input)

    def _called(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x

    @torch.jit.unused
    def _dispatched(self, x: Tensor) -> Tensor:
        if unwatched(x) and not torch.is_autocast_enabled("cpu"):
            known = _known.get(self)
            if known is not None and known.holds(self, x):
                return known(x)
            if (steps := self._ready(x)) is not None:
                _known[self] = known = Known.of(self, x, steps)
                return known(x)
        return self._called(x)

    def _ready(self, x: Tensor) -> list[Ready] | None:
        """The operations of all blocks for such an x; None where one of them would call its children."""
        found: list[Ready] = []
        for block in self:
            steps = block.ready(x) if type(block) is Int8Block and not has_hooks(block) else None
            if steps is None:
                return None
            found += steps
        return found

    def __getitem__(self, index: int | slice) -> nn.Module:  # type: ignore[override]
        if isinstance(index, slice):  # nn.Sequential would make one of its own class from a dict
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def back(self) -> nn.Module:
        """The plain `nn.Sequential` of the children that there are now."""
        module = with_children(self.original, {})
        module.__dict__["_modules"] = dict(self._modules)
        module.training = self.training
        return module
