"""A transformer MLP with low-rank linears, as one module that one kernel can run."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from vitlr.errors import InputError
from vitlr.nn._plain import has_hooks, is_plain, is_transformed
from vitlr.nn.lowrank_linear import LowRankLinear
from vitlr.ops import lowrank_mlp as op
from vitlr.ops._activations import ACTIVATIONS

# timm's own classes by name: this package does not import timm.
_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "none",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.Swish": "silu",
}
_KEPT = ("fc1", "act", "fc2")


def activation_name(act: nn.Module) -> str | None:
    """The op's name of an activation module, or None if the op has none for it (QuickGELU, GLU ...)."""
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(f"{type(act).__module__}.{type(act).__qualname__}")


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
        missing = [name for name in _KEPT if not isinstance(getattr(module, name, None), nn.Module)]
        if missing:
            return f"it has no {', '.join(missing)}"
        fc1, act, fc2 = (module.get_submodule(name) for name in _KEPT)
        for name, child in (("fc1", fc1), ("fc2", fc2)):
            if type(child) not in (nn.Linear, LowRankLinear):
                return f"{name} is a {type(child).__name__}, not a plain linear"
        if not any(isinstance(child, LowRankLinear) for child in (fc1, fc2)):
            return "neither fc1 nor fc2 is low-rank"
        if activation_name(act) is None:
            return f"its activation {type(act).__name__} is none of {', '.join(ACTIVATIONS)}"
        if module._parameters or module._buffers:
            return f"it has parameters of its own: {', '.join([*module._parameters, *module._buffers])}"
        for name, child in module.named_children():
            if name not in _KEPT and not does_nothing(child):
                return f"its {name} {child} does something"
        if has_hooks(module):
            return "it has hooks"
        return _not_a_chain(module)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.fc2(self.act(self.fc1(x)))
        return self._dispatched(x)

    @torch.jit.unused
    def _dispatched(self, x: Tensor) -> Tensor:
        fc1, act, fc2 = self.fc1, self.act, self.fc2
        if op.has_kernels() and not is_transformed():
            name, first, second = activation_name(act), factors(fc1), factors(fc2)
            if name and first and second and not has_hooks(act):
                ranks = (getattr(fc1, "rank", None), getattr(fc2, "rank", None))
                if op.kernel_chosen(x, fc1.in_features, fc1.out_features, fc2.out_features, *ranks, name):
                    return op.lowrank_mlp(x, *first, *second, None, name)
        return fc2(act(fc1(x)))

    def to_mlp(self) -> nn.Module:
        """The original module, class and all, with the children as they are now."""
        mlp = with_children(self.__dict__["_original"], {name: getattr(self, name) for name in _KEPT})
        mlp.training = self.training
        for name, child in mlp._modules.items():
            if name not in _KEPT and child is not None:
                mlp._modules[name] = copy.deepcopy(child).train(self.training)
        return mlp


def with_children(module: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    """A shallow copy of a module with some of its children replaced, their order kept."""
    twin = copy.copy(module)
    # Children, hooks, parameters live in dicts: shared ones would make what is done to one appear on the other.
    twin.__dict__.update({name: value.copy() for name, value in vars(module).items() if isinstance(value, dict)})
    twin._modules.update(children)
    return twin


def does_nothing(child: nn.Module) -> bool:
    """Whether a module passes on what it gets, in training too."""
    if has_hooks(child):
        return False
    return type(child) is nn.Identity or (type(child) is nn.Dropout and child.p == 0)


def factors(linear: nn.Linear | LowRankLinear) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """(B, A, bias) of a low-rank linear, (W, None, bias) of a dense one, None unless everything inside is plain."""
    if isinstance(linear, LowRankLinear):
        if (
            type(linear) is not LowRankLinear
            or has_hooks(linear)
            or not (is_plain(linear.down) and is_plain(linear.up))
        ):
            return None
        return linear.down.weight, linear.up.weight, linear.up.bias
    return (linear.weight, None, linear.bias) if is_plain(linear) else None


class LeafTracer(fx.Tracer):
    """Records calls of children without looking into them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


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
