"""Which linear layers of a model can be compressed, which stay dense by default, and which nobody can reach."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from vitlr.anatomy import naming, timm
from vitlr.anatomy.naming import Hidden
from vitlr.errors import InputError
from vitlr.nn import Fp8Linear, Int8Linear, LowRankLinear, QuantizedLinear, ResidualLowRankLinear
from vitlr.runtime import modules

__all__ = [
    "Hidden",
    "Surface",
    "classifier_names",
    "hidden",
    "is_scale",
    "kept",
    "norms_before",
    "scales_after",
    "survey",
    "targets",
]

Patterns = str | Iterable[str] | None


@dataclass(frozen=True)
class Surface:
    """Every weight of a model that multiplies, in module order, under one of three headings."""

    targets: dict[str, nn.Linear]
    kept: dict[str, str]
    """Linears that stay dense by default, with the reason."""
    hidden: dict[str, Hidden]
    """Weights that cannot be compressed at all, with the reason and their parameter count."""


def survey(model: nn.Module, factors: bool = False) -> Surface:
    """Sort the linears of `model` into targets, kept and hidden; layers compressed already are in none of them.

    With `factors`, both linears of a `LowRankLinear` are.
    """
    heads = {id(m) for head in (*timm.classifiers(model), *_generic_classifiers(model)) for m in head.modules()}
    queries = {id(m) for m in timm.constant_queries(model)}
    unreachable = dict(naming.bypassed(model))
    tied = naming.weights_of_many(model)
    surface = Surface({}, {}, dict(naming.packed(model)))
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, ResidualLowRankLinear) or (isinstance(module, LowRankLinear) and not factors):
            inside = (*inside, f"{name}.")
        if not isinstance(module, nn.Linear) or name.startswith(inside):
            continue
        reason = unreachable.get(name)
        dense = "the classifier" if id(module) in heads else naming.role(name)
        if id(module) in queries:
            dense = "its input is a learned constant, it sees no image"
        if reason is None and dense is not None:
            surface.kept[name] = dense
            continue
        reason = reason or naming.unusual(module)
        names = tied.get(id(module._parameters.get("weight")))
        if reason is None and names:
            reason = f"its weight is tied: {' = '.join(names)}"
        if reason is None:
            surface.targets[name] = module
        else:
            surface.hidden[name] = Hidden(reason, sum(p.numel() for p in module.parameters()))
    return surface


def targets(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None, *, factors: bool = False
) -> dict[str, nn.Linear]:
    """Return the compressible linears of `model` by qualified name, in module order; a shared module appears once.

    Only modules that are exactly `nn.Linear` count. Classifiers, embeddings and layers that no image feeds stay dense.
    With `factors` those of low-rank layers count as well.
    `include` restricts to names that match one of its regular expressions (`re.search`), `exclude` removes names.
    Raises `InputError` for a bad expression, one that matches no linear, and where no layer is left.
    """
    surface = survey(model, factors)
    names = [*surface.targets, *surface.kept, *surface.hidden]
    wanted = _compile(include, "include", list(surface.targets), surface)
    unwanted = _compile(exclude, "exclude", names, surface)
    found = {
        name: linear
        for name, linear in surface.targets.items()
        if (not wanted or any(p.search(name) for p in wanted)) and not any(p.search(name) for p in unwanted)
    }
    if not found:
        raise InputError(_nothing(model, surface))
    return found


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the qualified names of the classifier's linears, in module order; () where there is none."""
    return tuple(name for name, reason in survey(model).kept.items() if reason == "the classifier")


def kept(model: nn.Module) -> dict[str, str]:
    """Return the linears that stay dense by default, each with the reason."""
    return survey(model).kept


def hidden(model: nn.Module) -> dict[str, Hidden]:
    """Return the weights that can be neither measured nor replaced, each with the reason and its parameter count."""
    return survey(model).hidden


def norms_before(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (norm, low-rank layers) by name where the norm feeds those layers and nothing else."""
    for norm, first, _, _ in timm.half_blocks(model):
        if all(isinstance(model.get_submodule(name), LowRankLinear) for name in first):
            yield norm, first


def scales_after(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (layer scale, low-rank or byte layer) by name where the scale multiplies what that returns, no more."""
    for _, _, last, scale in timm.half_blocks(model):
        takes = isinstance(model.get_submodule(last), (LowRankLinear, Int8Linear, Fp8Linear))
        if takes and is_scale(model.get_submodule(scale)):
            yield scale, last


def is_scale(module: nn.Module) -> bool:
    """Whether a module is timm's layer scale, `x · gamma` by channel."""
    return modules.class_of(module) in timm.SCALES


def _generic_classifiers(model: nn.Module) -> list[nn.Module]:
    """Guess by names where timm's model names no linear: a head of one's own may stand beside the one it has lost."""
    if not callable(getattr(model, "get_classifier", None)):
        return naming.classifiers(model)
    named = any(isinstance(m, nn.Linear) for head in timm.classifiers(model) for m in head.modules())
    return [] if named else naming.own_heads(model)


def _compile(patterns: Patterns, option: str, names: list[str], surface: Surface) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in (patterns,) if isinstance(patterns, str) else tuple(patterns or ()):
        try:
            regex = re.compile(pattern)
        except (re.error, TypeError) as cause:
            raise InputError(f"{option}: {pattern!r} is not a regular expression: {cause}") from cause
        if not any(regex.search(name) for name in names):
            raise InputError(f"{option}: {pattern!r} matches no compressible linear{_instead(regex, surface)}")
        compiled.append(regex)
    return compiled


def _instead(regex: re.Pattern[str], surface: Surface) -> str:
    for name, reason in (*surface.kept.items(), *((n, h.reason) for n, h in surface.hidden.items())):
        if regex.search(name):
            return f"; it matches {name}, which cannot be chosen: {reason}"
    some = list(surface.targets)
    return f"; names look like {some[0]}, {some[-1]}" if some else ""


def _nothing(model: nn.Module, surface: Surface) -> str:
    if surface.targets:
        return "include and exclude leave no linear to compress; choose wider patterns"
    if isinstance(model, torch.jit.ScriptModule):
        return "the model is fixed by torch.jit; give the one that it was scripted or traced from"
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        return "the linears of this model hold codes of rounded weights: vitlr.to_dense(model) has linears again"
    for name, reason in (*((n, h.reason) for n, h in surface.hidden.items()), *surface.kept.items()):
        return f"{type(model).__qualname__} has no linear that can be compressed; {name}: {reason}"
    return f"{type(model).__qualname__} has no nn.Linear, so there is nothing to compress"
