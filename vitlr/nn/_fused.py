"""What modules that stand for a whole MLP share: what they take, what they read, how the original comes back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

from torch import Tensor, fx, nn

from vitlr.nn._plain import has_hooks, is_plain
from vitlr.nn.lowrank_linear import LowRankLinear
from vitlr.ops.layers.activations import ACTIVATIONS

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


def activation_name(act: nn.Module) -> str | None:
    """The op's name of an activation module, or None if the op has none for it (QuickGELU, GLU ...)."""
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(f"{type(act).__module__}.{type(act).__qualname__}")


def objection(module: nn.Module, kept: tuple[str, ...]) -> str | None:
    """Why the children of an MLP cannot be run by one operation; None if they can. Its forward is not looked at.

    `kept`: the names of its linears and of `act`.
    """
    missing = [name for name in kept if not isinstance(getattr(module, name, None), nn.Module)]
    if missing:
        return f"it has no {', '.join(missing)}"
    linears = {name: module.get_submodule(name) for name in kept if name != "act"}
    for name, child in linears.items():
        if type(child) not in (nn.Linear, LowRankLinear):
            return f"{name} is a {type(child).__name__}, not a plain linear"
    if not any(isinstance(child, LowRankLinear) for child in linears.values()):
        return f"none of {', '.join(linears)} is low-rank"
    act = module.get_submodule("act")
    if activation_name(act) is None:
        return f"its activation {type(act).__name__} is none of {', '.join(ACTIVATIONS)}"
    if module._parameters or module._buffers:
        return f"it has parameters of its own: {', '.join([*module._parameters, *module._buffers])}"
    for name, child in module.named_children():
        if name not in kept and not does_nothing(child):
            return f"its {name} {child} does something"
    return "it has hooks" if has_hooks(module) else None


def with_children(module: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    """A shallow copy of a module with some of its children replaced, their order kept."""
    twin = copy.copy(module)
    # Children, hooks, parameters live in dicts: shared ones would make what is done to one appear on the other.
    twin.__dict__.update({name: value.copy() for name, value in vars(module).items() if isinstance(value, dict)})
    twin._modules.update(children)
    return twin


def restored(original: nn.Module, fused: nn.Module, kept: Iterable[str]) -> nn.Module:
    """The original module, class and all, with the kept children as the fused one has them now."""
    mlp = with_children(original, {name: getattr(fused, name) for name in kept})
    mlp.training = fused.training
    for name, child in mlp._modules.items():
        if name not in kept and child is not None:
            mlp._modules[name] = copy.deepcopy(child).train(fused.training)
    return mlp


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
