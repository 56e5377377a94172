"""A gated transformer MLP with low-rank linears, as one module that one kernel can run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitlr.nn._formula import Formula
from vitlr.nn._fused_mlp import FusedMlp, activation_name, factors
from vitlr.nn._plain import has_hooks, is_transformed
from vitlr.ops.dispatch.registration import kernel_chosen
from vitlr.ops.dispatch.registry import has_kernels
from vitlr.ops.layers import lowrank_glu as op
from vitlr.ops.layers.factors import Factors

if TYPE_CHECKING:
    from vitlr.nn.lowrank_linear import LowRankLinear

# What a forward comes to -> whether the gate is the second half of a packed fc1.
_FORMS = {
    "fc2(act(fc1_g(x)) * fc1_x(x))": False,
    "fc2(act(fc1(x)[0]) * fc1(x)[1])": False,
    "fc2(act(fc1(x)[1]) * fc1(x)[0])": True,
}


class LowRankGLU(FusedMlp):
    """`y = fc2(act(gate) ∘ value)` of a gated MLP as timm writes it, with at least one `LowRankLinear`.

    In place of timm's `SwiGLU` (gate fc1_g(x), value fc1_x(x)) and of `GluMlp` and `SwiGLUPacked` (the two halves of
    fc1(x)), whose norm must be an Identity. The children keep their names, so state_dict keys do not change, and are
    shared with `mlp`; `back` gives the original module back. The fused op runs where dispatch chooses a kernel and
    everything inside is plain; otherwise the children are called. Raises InputError with the reason of `why_not`.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations and does not know unions of modules
        fc1: nn.Linear | LowRankLinear
        fc1_g: nn.Linear | LowRankLinear
        fc1_x: nn.Linear | LowRankLinear
        act: nn.Module
        fc2: nn.Linear | LowRankLinear

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__(mlp)
        self.gate_last = _FORMS[Formula(mlp, self.kept).read()]

    @classmethod
    def children_of(cls, module: nn.Module) -> tuple[str, ...]:
        return (*(("fc1_g", "fc1_x") if "fc1_g" in module._modules else ("fc1",)), "act", "fc2")

    @classmethod
    def unlike(cls, form: str) -> str | None:
        return None if form in _FORMS else f"its forward is {form}, none of {', '.join(_FORMS)}"

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._children(x)
        return self._dispatched(x)

    def _children(self, x: Tensor) -> Tensor:
        if hasattr(self, "fc1"):
            first, second = self.fc1(x).chunk(2, dim=-1)
            if self.gate_last:
                return self.fc2(first * self.act(second))
            return self.fc2(self.act(first) * second)
        else:
            return self.fc2(self.act(self.fc1_g(x)) * self.fc1_x(x))

    @torch.jit.unused
    def _dispatched(self, x: Tensor) -> Tensor:
        if has_kernels(op.OP) and not is_transformed():
            name, pair, last = activation_name(self.act), self._gate_and_value(), factors(self.fc2)
            if name and pair and last and not has_hooks(self.act):
                gate, value, shared = pair
                sizes = (gate.B.shape[1], self.fc2.in_features, self.fc2.out_features)
                if kernel_chosen(op.OP, x, *sizes, gate.rank, value.rank, last.rank, shared, name, False):
                    return op.lowrank_glu(x, *gate, *value, *last, None, name)
        return self._children(x)

    def _gate_and_value(self) -> tuple[Factors, Factors, bool] | None:
        """The factors of gate and of value and whether B is one tensor; None unless everything inside is plain."""
        if "fc1" not in self._modules:
            gate, value = factors(self.fc1_g), factors(self.fc1_x)
            return None if gate is None or value is None else (gate, value, False)
        found = factors(self.fc1)
        if found is None:
            return None
        B, A, b = found
        width = self.fc2.in_features
        halves = [
            Factors(B[rows] if A is None else B, None if A is None else A[rows], None if b is None else b[rows])
            for rows in (slice(None, width), slice(width, None))
        ]
        gate, value = reversed(halves) if self.gate_last else halves
        return gate, value, A is not None
