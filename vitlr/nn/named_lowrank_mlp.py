"""The MLP of any library with low-rank linears, as one module that one kernel can run."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from vitlr.nn._formula import Formula, Untraceable
from vitlr.nn._plain import does_nothing
from vitlr.nn.lowrank_linear import LowRankLinear
from vitlr.nn.lowrank_mlp import LowRankMLP

_CHAIN = re.compile(r"(\w+)\((\w+)\((\w+)\(x\)\)\)")


class NamedLowRankMLP(LowRankMLP):
    """`y = second(act(first(x)))`: a `LowRankMLP` whose parts keep the names that another library gave them.

    transformers' `fc1, activation_fn, fc2`, open_clip's `c_fc, gelu, c_proj`, the numbers of an `nn.Sequential`.
    Raises InputError with the reason of `why_not`.
    """

    @classmethod
    def children_of(cls, module: nn.Module) -> tuple[str, ...]:
        """First linear, activation, second linear by name; () where the forward is anything else."""
        steps = tuple(name for name, child in module.named_children() if not does_nothing(child))
        try:
            found = _CHAIN.fullmatch(Formula(module, steps).read())
        except Untraceable:
            return ()
        return () if found is None else found.groups()[::-1]

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        if isinstance(module, LowRankMLP):
            return "it is one already"
        if not any(isinstance(child, LowRankLinear) for child in module.children()):
            return "none of its children is low-rank"
        kept = cls.children_of(module)
        return cls.objection(module, kept) if kept else "its forward is more than a linear, an activation and a linear"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._dispatched(x)
        return y

    def _parts(self) -> tuple[Any, nn.Module, Any]:
        first, act, second = (self.get_submodule(name) for name in self.kept)
        return first, act, second
