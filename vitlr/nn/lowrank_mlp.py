"""A transformer MLP with low-rank linears, as one module that one kernel can run."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.nn._fused import LeafTracer, activation_name, does_nothing, factors, objection, restored, with_children
from vitlr.nn._plain import has_hooks, is_transformed
from vitlr.ops.dispatch.registration import kernel_chosen
from vitlr.ops.dispatch.registry import has_kernels
from vitlr.ops.layers import lowrank_mlp as op

if TYPE_CHECKING:
    from vitlr.nn.lowrank_linear import LowRankLinear

_KEPT = ("fc1", "act", "fc2")


class LowRankMLP(nn.Module):
    """`y = fc2(act(fc1(x)))` of an MLP as timm writes it, with at least one of fc1, fc2 a `LowRankLinear`.

    The children keep their names, so state_dict keys do not change, and are shared with `mlp`; `to_mlp` gives the
    original module back. The fused op runs where dispatch chooses a kernel and everything inside is plain; otherwise
    the children are called. Raises InputError with the reason of `why_not`.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations and does not know unions of modules
        fc1: nn.Linear | LowRankLinear
        act: nn.Module
        fc2: nn.Linear | LowRankLinear

    def __init__(self, mlp: nn.Module) -> None:
        reason = self.why_not(mlp)
        if reason is not None:
            raise InputError(f"{type(mlp).__name__} cannot become a LowRankMLP: {reason}")
        super().__init__()
        for name in _KEPT:
            self.add_module(name, getattr(mlp, name))
        # The original, emptied of what it shares with this module; past nn.Module, which would register it as a child.
        self.__dict__["_original"] = with_children(mlp, {name: None for name in _KEPT})
        self.training = mlp.training

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """Why a module cannot become a LowRankMLP with the same outputs; None if it can."""
        if isinstance(module, LowRankMLP):
            return "it is one already"
        return objection(module, _KEPT) or _not_a_chain(module)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.fc2(self.act(self.fc1(x)))
        return self._dispatched(x)

    @torch.jit.unused
    def _dispatched(self, x: Tensor) -> Tensor:
        fc1, act, fc2 = self.fc1, self.act, self.fc2
        if has_kernels(op.OP) and not is_transformed():
            name, first, second = activation_name(act), factors(fc1), factors(fc2)
            if name and first and second and not has_hooks(act):
                sizes = (fc1.in_features, fc1.out_features, fc2.out_features)
                ranks = (getattr(fc1, "rank", None), getattr(fc2, "rank", None))
                if kernel_chosen(op.OP, x, *sizes, *ranks, name, False):
                    return op.lowrank_mlp(x, *first, *second, None, name)
        return fc2(act(fc1(x)))

    def to_mlp(self) -> nn.Module:
        """The original module, class and all, with the children as they are now."""
        return restored(self.__dict__["_original"], self, _KEPT)


def _not_a_chain(module: nn.Module) -> str | None:
    """Why the forward of a module is not fc1, act, fc2 one after the other; None if it is.

    Attributes alone do not tell (a residual, a gate); the traced graph does, on any device and without running it.
    """
    try:
        nodes = list(LeafTracer().trace(module).nodes)
    except Exception as error:  # whatever its author wrote: control flow on values, missing arguments ...
        return f"its forward cannot be traced ({type(error).__name__})"
    steps = []
    for before, node in itertools.pairwise(nodes):
        if node.args != (before,) or node.kwargs or node.op not in ("call_module", "output"):
            return "its forward is more than fc1, act, fc2 in a row"
        if node.op == "call_module" and (
            node.target in _KEPT or not does_nothing(module.get_submodule(str(node.target)))
        ):
            steps.append(str(node.target))
    return None if tuple(steps) == _KEPT else f"its forward runs {', '.join(steps)}, not fc1, act, fc2"
