"""What modules that stand for a whole MLP share: which forwards they take, and what they read."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from vitlr.nn._formula import Formula, Untraceable
from vitlr.nn._fused import Fused
from vitlr.nn._plain import does_nothing, foreign_weight, has_hooks, is_plain
from vitlr.nn.lowrank_linear import LowRankLinear
from vitlr.ops.layers.activations import ACTIVATIONS
from vitlr.ops.layers.factors import Factors
from vitlr.runtime.modules import class_of


class FusedMlp(Fused):
    """A fused MLP; the fused op runs where dispatch chooses a kernel and everything inside is plain.

    Its linears are of the kinds it `TAKES`.
    """

    TAKES: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, LowRankLinear)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module cannot become one of these with the same outputs; None if it can."""
        if isinstance(module, cls):
            return "it is one already"
        kept = cls.children_of(module)
        try:
            return cls.objection(module, kept) or cls.unlike(Formula(module, kept).read())
        except Untraceable as reason:
            return str(reason)

    @classmethod
    def objection(cls, module: nn.Module, kept: tuple[str, ...]) -> str | None:
        """Why the children of an MLP cannot be run by one operation; None if they can. Its forward is not looked at.

        `kept`: the names of its first linears, of the activation and of the second linear.
        """
        missing = [name for name in kept if not isinstance(getattr(module, name, None), nn.Module)]
        if missing:
            return f"it has no {', '.join(missing)}"
        *_, act_name, _ = kept
        linears = {name: module.get_submodule(name) for name in kept if name != act_name}
        for name, child in linears.items():
            if type(child) not in cls.TAKES:
                return f"{name} is a {type(child).__name__}, not a plain linear"
            if (foreign := foreign_weight(child)) is not None:
                return f"{name} holds a {foreign}, no plain weight"
        lacking = cls.lacking(linears)
        if lacking is not None:
            return lacking
        act = module.get_submodule(act_name)
        if activation_name(act) is None:
            return f"its activation {type(act).__name__} is none of {', '.join(ACTIVATIONS)}"
        if module._parameters or module._buffers:
            return f"it has parameters of its own: {', '.join([*module._parameters, *module._buffers])}"
        for name, child in module.named_children():
            if name not in kept and not does_nothing(child):
                return f"its {name} {child} does something"
        return "it has hooks" if has_hooks(module) else None

    @classmethod
    def lacking(cls, linears: dict[str, nn.Module]) -> str | None:
        """What the linears must have and have not; None where they have it."""
        low = any(isinstance(linear, LowRankLinear) for linear in linears.values())
        return None if low else f"none of {', '.join(linears)} is low-rank"

    @classmethod
    def unlike(cls, form: str) -> str | None:
        """Why a forward of that formula is not this module's; None if it is."""
        raise NotImplementedError


# Classes of timm and transformers by name: this package imports neither.
_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "none",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.Swish": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
}


def activation_name(act: nn.Module) -> str | None:
    """The op's name of an activation module, or None if the op has none for it (QuickGELU, GLU ...)."""
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(class_of(act))


def factors(linear: nn.Linear | LowRankLinear) -> Factors | None:
    """The factors of a low-rank linear or the weight of a dense one; None unless everything inside is plain."""
    if isinstance(linear, LowRankLinear):
        plain = type(linear) is LowRankLinear and not has_hooks(linear)
        if not (plain and is_plain(linear.down) and is_plain(linear.up)):
            return None
        return Factors(linear.down.weight, linear.up.weight, linear.up.bias)
    return Factors(linear.weight, None, linear.bias) if is_plain(linear) else None
