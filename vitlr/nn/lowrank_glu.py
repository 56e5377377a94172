"""A gated transformer MLP with low-rank linears, as one module that one kernel can run."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.nn._fused import LeafTracer, activation_name, does_nothing, factors, objection, restored, with_children
from vitlr.nn._plain import has_hooks, is_transformed
from vitlr.ops.dispatch.registration import kernel_chosen
from vitlr.ops.dispatch.registry import has_kernels
from vitlr.ops.layers import lowrank_glu as op

if TYPE_CHECKING:
    from vitlr.nn.lowrank_linear import LowRankLinear

_SPLIT = ("fc1_g", "fc1_x", "act", "fc2")
_PACKED = ("fc1", "act", "fc2")
# What a forward comes to -> whether the gate is the second half of a packed fc1.
_FORMS = {
    "fc2(act(fc1_g(x)) * fc1_x(x))": False,
    "fc2(act(fc1(x)[0]) * fc1(x)[1])": False,
    "fc2(act(fc1(x)[1]) * fc1(x)[0])": True,
}


class LowRankGLU(nn.Module):
    """`y = fc2(act(gate) ∘ value)` of a gated MLP as timm writes it, with at least one `LowRankLinear`.

    In place of timm's `SwiGLU` (gate fc1_g(x), value fc1_x(x)) and of `GluMlp` and `SwiGLUPacked` (the two halves of
    fc1(x)), whose norm must be an Identity. The children keep their names, so state_dict keys do not change, and are
    shared with `mlp`; `to_mlp` gives the original module back. The fused op runs where dispatch chooses a kernel and
    everything inside is plain; otherwise the children are called. Raises InputError with the reason of `why_not`.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations and does not know unions of modules
        fc1: nn.Linear | LowRankLinear
        fc1_g: nn.Linear | LowRankLinear
        fc1_x: nn.Linear | LowRankLinear
        act: nn.Module
        fc2: nn.Linear | LowRankLinear

    def __init__(self, mlp: nn.Module) -> None:
        reason = self.why_not(mlp)
        if reason is not None:
            raise InputError(f"{type(mlp).__name__} cannot become a LowRankGLU: {reason}")
        super().__init__()
        kept = _kept(mlp)
        for name in kept:
            self.add_module(name, getattr(mlp, name))
        self.gate_last = _FORMS[_form(mlp)]
        # The original, emptied of what it shares with this module; past nn.Module, which would register it as a child.
        self.__dict__["_original"] = with_children(mlp, {name: None for name in kept})
        self.training = mlp.training

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """Why a module cannot become a LowRankGLU with the same outputs; None if it can."""
        if isinstance(module, LowRankGLU):
            return "it is one already"
        kept = _kept(module)
        reason = objection(module, kept)
        if reason is not None:
            return reason
        try:
            form = _form(module)
        except Exception as error:  # whatever its author wrote: control flow on values, missing arguments ...
            return f"its forward cannot be traced ({type(error).__name__})"
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
                (Bg, Ag, bg), (Bv, Av, bv), shared = pair
                rg, rv = (None if A is None else B.shape[0] for B, A in ((Bg, Ag), (Bv, Av)))
                width, r2 = self.fc2.in_features, getattr(self.fc2, "rank", None)
                sizes = (Bg.shape[1], width, self.fc2.out_features)
                if kernel_chosen(op.OP, x, *sizes, rg, rv, r2, shared, name, False):
                    return op.lowrank_glu(x, Bg, Ag, bg, Bv, Av, bv, *last, None, name)
        return self._children(x)

    def _gate_and_value(self) -> tuple[Any, Any, bool] | None:
        """(B, A, bias) of gate and of value and whether B is one tensor; None unless everything inside is plain."""
        if "fc1" not in self._modules:
            gate, value = factors(self.fc1_g), factors(self.fc1_x)
            return None if gate is None or value is None else (gate, value, False)
        found = factors(self.fc1)
        if found is None:
            return None
        B, A, b = found
        width = self.fc2.in_features
        halves = [
            (B[rows] if A is None else B, None if A is None else A[rows], None if b is None else b[rows])
            for rows in (slice(None, width), slice(width, None))
        ]
        gate, value = reversed(halves) if self.gate_last else halves
        return gate, value, A is not None

    def to_mlp(self) -> nn.Module:
        """The original module, class and all, with the children as they are now."""
        return restored(self.__dict__["_original"], self, _kept(self))


def _kept(module: nn.Module) -> tuple[str, ...]:
    return _SPLIT if "fc1_g" in module._modules else _PACKED


def _form(module: nn.Module) -> str:
    """What a forward computes, written as a formula: calls, halves, and a product whose activated factor comes first.

    Attributes alone do not tell (a residual, another gate); the traced graph does, on any device, without running it.
    """
    values: dict[Any, str] = {}
    for node in LeafTracer().trace(module).nodes:
        args = [values.get(arg, arg) for arg in node.args]
        if node.op == "placeholder":
            values[node] = "x"
        elif node.op == "call_module" and str(node.target) not in _kept(module):
            values[node] = str(args[0] if does_nothing(module.get_submodule(str(node.target))) else node)
        elif node.op == "call_module":
            values[node] = f"{node.target}({', '.join(map(str, args))})"
        elif node.op == "call_method" and (node.target, args[1:], node.kwargs) == ("chunk", [2], {"dim": -1}):
            values[node] = str(args[0])
        elif node.op == "call_function" and node.target is operator.getitem:
            values[node] = f"{args[0]}[{args[1]}]"
        elif node.op == "call_function" and node.target is operator.mul:
            values[node] = " * ".join(sorted(map(str, args)))  # "act" sorts before "fc1"
        elif node.op == "output":
            return str(args[0])
        else:
            values[node] = f"{node.target}({', '.join(map(str, args))})"
    raise ValueError("no output")
