"""A transformer MLP with low-rank linears, as one module that one kernel can run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitlr.nn._fused_mlp import FusedMlp, activation_name, factors
from vitlr.nn._plain import has_hooks, is_transformed
from vitlr.ops.dispatch.registration import kernel_chosen
from vitlr.ops.dispatch.registry import has_kernels
from vitlr.ops.layers import lowrank_mlp as op

if TYPE_CHECKING:
    from vitlr.nn.lowrank_linear import LowRankLinear

_CHAIN = re.compile(r"(\w+\()*x\)*")


class LowRankMLP(FusedMlp):
    """`y = fc2(act(fc1(x)))` of an MLP as timm writes it, with at least one of fc1, fc2 a `LowRankLinear`.

    The children keep their names, so state_dict keys do not change, and are shared with `mlp`; `back` gives the
    original module back. The fused op runs where dispatch chooses a kernel and everything inside is plain; otherwise
    the children are called. Raises InputError with the reason of `why_not`.
    """

    KEPT = ("fc1", "act", "fc2")

    if TYPE_CHECKING:  # TorchScript reads annotations and does not know unions of modules
        fc1: nn.Linear | LowRankLinear
        act: nn.Module
        fc2: nn.Linear | LowRankLinear

    @classmethod
    def unlike(cls, form: str) -> str | None:
        if not _CHAIN.fullmatch(form):
            return "its forward is more than fc1, act, fc2 in a row"
        steps = tuple(reversed(re.findall(r"\w+(?=\()", form)))
        return None if steps == cls.KEPT else f"its forward runs {', '.join(steps)}, not fc1, act, fc2"

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.fc2(self.act(self.fc1(x)))
        return self._dispatched(x)

    @torch.jit.unused
    def _parts(self) -> tuple[Any, nn.Module, Any]:
        return self.fc1, self.act, self.fc2

    @torch.jit.unused
    def _dispatched(self, x: Tensor) -> Tensor:
        fc1, act, fc2 = self._parts()
        if has_kernels(op.OP) and not is_transformed():
            name, first, second = activation_name(act), factors(fc1), factors(fc2)
            if name and first and second and not has_hooks(act):
                sizes = (fc1.in_features, fc1.out_features, fc2.out_features, first.rank, second.rank)
                if kernel_chosen(op.OP, x, *sizes, name, False):
                    return op.lowrank_mlp(x, *first, *second, None, name)
        return fc2(act(fc1(x)))
