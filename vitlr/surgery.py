"""Surgery: swap linear layers for low-rank ones and back, fuse MLPs, describe what was swapped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitlr import folding, surfaces
from vitlr.errors import InputError
from vitlr.nn import (
    FoldedScale,
    FusedAttention,
    LowRankGLU,
    LowRankLinear,
    LowRankMLP,
    ResidualLowRankLinear,
    SelectedLinear,
)
from vitlr.nn._plain import has_hooks
from vitlr.ops.lowrank_residual_linear import check_form
from vitlr.plans import Plan
from vitlr.pruning import Mlp, find_mlps, narrow_mlp, narrowed_mlps, read_mlp
from vitlr.spectra import Spectra

FUSED = (LowRankMLP, LowRankGLU, FusedAttention)


def replace_layers(
    model: nn.Module,
    plan: Plan,
    spectra: Spectra,
    *,
    inplace: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> nn.Module:
    """Narrow every planned MLP, replace every planned layer `W` by factors `A [N, r]`, `B [r, K]`.

    A new model unless `inplace`. Where an MLP is both narrowed and factorised, its first linears keep rows of the dense
    one's A, and the second one's factors are those of its weights after compensation.

    Raises `InputError` where plan, spectra and model do not belong together; the model is then untouched.
    """
    if spectra.fingerprint != plan.fingerprint:
        raise InputError(
            f"the plan is of weights {plan.fingerprint}, the spectra of {spectra.fingerprint}; make the plan again"
        )
    modules = dict(model.named_modules())
    for row in plan.layers:
        linear, shape = modules.get(row.name), (row.out_features, row.in_features)
        if type(linear) is not nn.Linear or linear.weight.shape != shape:
            raise InputError(f"the plan is of another model: no linear {shape[0]}x{shape[1]} at {row.name!r}")
        if row.rank is not None and has_hooks(linear):
            raise InputError(f"layer {row.name} has hooks, which would vanish with it; take them off first")
    known = find_mlps(model) if plan.narrowed else {}
    for mlp in plan.widths:
        if mlp.name in plan.narrowed and (mlp.name not in known or known[mlp.name].width != mlp.full_width):
            raise InputError(f"the plan is of another model: no MLP of width {mlp.full_width} at {mlp.name!r}")
    if not inplace:
        model = copy.deepcopy(model)
    surfaces.make_visible(model)
    factors = _narrow(model, plan, spectra)
    for done, (name, rank) in enumerate(plan.ranks.items(), 1):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        spectrum = spectra.layers[name]
        A, B, bias = factors[name] if name in factors else spectrum.factors(linear.weight, rank, linear.bias)
        low = LowRankLinear.from_factors(A, B, bias, device=linear.weight.device, dtype=linear.weight.dtype)
        _swap(model, name, low.train(linear.training).requires_grad_(linear.weight.requires_grad))
        if progress is not None:
            progress(done, len(plan.ranks))
    return model


def _narrow(model: nn.Module, plan: Plan, spectra: Spectra) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """Narrow the planned MLPs; return the factors of those of their linears that have a rank as well."""
    factors = {}
    for name, width in plan.narrowed.items():
        spectrum = spectra.widths[name]
        mlp, keep = read_mlp(model.get_submodule(name), name), spectrum.keep(width)
        weight, bias = spectrum.weights(width)
        for first in spectrum.first:
            if first in plan.ranks:
                linear, rows = model.get_submodule(first), mlp.rows(keep)
                A, B, b = spectra.layers[first].factors(linear.weight, plan.ranks[first], linear.bias)  # type: ignore[arg-type]
                factors[first] = A[rows], B, None if b is None else b[rows]
        if spectrum.second in plan.ranks:
            solved = spectrum.second_spectrum(width)
            factors[spectrum.second] = solved.factors(weight, plan.ranks[spectrum.second], bias)
        narrow_mlp(mlp, keep, weight=weight, bias=bias)
    return factors


def _swap(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in place of the module called `name`, under every name that it is registered by."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                setattr(parent, child, new)


def to_dense(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Multiply all factors out, `W = A B` or `A B + R`: the same function on plain `nn.Linear`s.

    Channels that were taken out of a layer (`SelectedLinear`) come back as zeros.
    """
    model = unfuse(model, inplace=inplace)
    for name, module in reversed(list(model.named_modules())):  # what a SelectedLinear holds before itself
        if isinstance(module, (LowRankLinear, ResidualLowRankLinear, SelectedLinear)):
            _swap(model, name, module.to_linear().train(module.training))
    return model


def fused(module: nn.Module) -> LowRankMLP | LowRankGLU | FusedAttention:
    """The fused module that stands for an MLP or an attention. Raises `InputError` with all reasons where none can."""
    reasons = {kind: kind.why_not(module) for kind in FUSED}
    for kind, reason in reasons.items():
        if reason is None:
            return kind(module)
    raise InputError("; ".join(f"no {kind.__name__}: {reason}" for kind, reason in reasons.items()))


def fuse(model: nn.Module, *, inplace: bool = False, fold: bool = True) -> nn.Module:
    """Gather every MLP with a low-rank layer, and timm's attention, into one module each; `unfuse` takes it back.

    Only where that is exact: plain MLPs become a `LowRankMLP`, gated ones a `LowRankGLU`, attention a
    `FusedAttention`. With `fold`, norms and layer scales beside low-rank
    layers are multiplied into their factors (`vitlr.folding`): the same function up to one rounding of the factors,
    which stays so after `unfuse`.
    """
    model = model if inplace else copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if name and any(kind.why_not(module) is None for kind in FUSED):
            _swap(model, name, fused(module))
    if fold:
        folding.fold(model)
    return model


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Give every fused module and folded layer scale back its original module, with the weights it has now."""
    model = model if inplace else copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedAttention):
            _swap(model, name, module.to_attention())
        elif isinstance(module, (LowRankMLP, LowRankGLU)):
            _swap(model, name, module.to_mlp())
        elif isinstance(module, FoldedScale):
            _swap(model, name, module.to_scale())
    return model


def fused_names(model: nn.Module) -> list[str]:
    """Names of the MLPs and attentions that are fused and of the layer scales that are folded."""
    return [name for name, module in model.named_modules() if isinstance(module, (*FUSED, FoldedScale))]


def fuse_again(model: nn.Module, names: Iterable[str]) -> None:
    """Fuse what `fused_names` named in a model of the same structure, whatever its weights, in place.

    Raises `InputError` for a module that cannot be fused.
    """
    for name in names:
        module = dict(model.named_modules()).get(name)
        try:
            if module is None or not name:
                raise InputError("there is no such module")
            _swap(model, name, FoldedScale(module) if surfaces.is_scale(module) else fused(module))
        except InputError as cause:
            raise InputError(f"it fuses {name!r}, which cannot be: {cause}") from cause


def structure(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What was done to a dense model, as plain values.

    `{mlp: {"width"}}` for narrowed MLPs, `{linear: {"inputs", "outputs", "in_features", "out_features", "bias"}}` for
    linears with channels taken out (how many are left, or None), `{linear: {"rank", "in_features", "out_features",
    "bias"}}` for low-rank layers; those with a residual have its `"residual"` (the form) and `"group_size"` as well.
    """
    layers = {
        name: {
            "rank": module.rank,
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.up.bias is not None,
            **(
                {"residual": module.residual, "group_size": module.group_size}
                if isinstance(module, ResidualLowRankLinear)
                else {}
            ),
        }
        for name, module in model.named_modules()
        if isinstance(module, (LowRankLinear, ResidualLowRankLinear))
    }
    selected = {name: module.describe() for name, module in model.named_modules() if isinstance(module, SelectedLinear)}
    return {**{name: {"width": mlp.width} for name, mlp in narrowed_mlps(model).items()}, **selected, **layers}


def restructure(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Narrow the named MLPs, take channels out of linears and swap them for low-rank ones, unfilled, in place.

    Device and dtype stay. Raises `InputError` for names that are no such MLP or no plain linear, shapes that do not
    fit, and widths, channels and ranks out of range; the model is then untouched.
    """
    modules = dict(model.named_modules())
    widths = {name: entry for name, entry in layers.items() if isinstance(entry, Mapping) and "width" in entry}
    selections = {name: entry for name, entry in layers.items() if isinstance(entry, Mapping) and "inputs" in entry}
    linears = {name: entry for name, entry in layers.items() if name not in widths and name not in selections}
    mlps = {name: _checked_mlp(modules, name, entry) for name, entry in widths.items()}
    sizes = {id(module): new for mlp in mlps.values() for module, new in _narrowed_sizes(mlp, widths[mlp.name])}
    for name, entry in selections.items():
        linear = modules[name] = _checked_linear(modules, name)
        _check_selection(name, {**_sizes(linear), **sizes.get(id(linear), {})}, entry)
        modules[f"{name}.linear"] = _left(linear, entry)
    for name, entry in linears.items():
        linear = _checked_linear(modules, name)
        expected = {**_sizes(linear), **sizes.get(id(linear), {})}
        if not isinstance(entry, Mapping) or {key: entry.get(key) for key in expected} != expected:
            raise InputError(f"layer {name}: expected {expected}, the file says {entry!r}")
        rank, bias = entry.get("rank"), entry.get("bias")
        limit = min(expected.values())
        if type(rank) is not int or not 1 <= rank <= limit or type(bias) is not bool:
            raise InputError(
                f"layer {name}: rank {rank!r} with bias {bias!r}, expected a rank from 1 to {limit} and true or false"
            )
        _check_residual(name, entry)
    surfaces.make_visible(model)
    with torch.no_grad():
        for name, mlp in mlps.items():
            narrow_mlp(mlp, torch.arange(widths[name]["width"]))
        for name, entry in selections.items():
            _swap(model, name, _selected(modules[f"{name}.linear"], entry))
        for name, entry in linears.items():
            w = modules[name].weight
            shape = (entry["in_features"], entry["out_features"], entry["rank"])
            low: nn.Module
            if "residual" in entry:
                low = ResidualLowRankLinear(
                    *shape, entry["residual"], entry["group_size"], entry["bias"], device=w.device, dtype=w.dtype
                )
            else:
                low = LowRankLinear(*shape, entry["bias"], device=w.device, dtype=w.dtype)
            _swap(model, name, low.train(modules[name].training))
    return model


def _checked_linear(modules: Mapping[str, nn.Module], name: str) -> nn.Linear:
    """The plain linear of that name, if there is one."""
    linear = modules.get(name)
    if type(linear) is not nn.Linear:
        raise InputError(f"layer {name!r} is no linear layer of this model")
    return linear


def _sizes(linear: nn.Linear) -> dict[str, int]:
    return {"in_features": linear.in_features, "out_features": linear.out_features}


def _check_selection(name: str, sizes: Mapping[str, int], entry: Mapping[str, Any]) -> None:
    """Raise `InputError` unless what a file says of the channels of a linear fits it."""
    if {key: entry.get(key) for key in sizes} != sizes or type(entry.get("bias")) is not bool:
        raise InputError(f"layer {name}: expected {dict(sizes)} and a bias or none, the file says {entry!r}")
    for key, size in (("inputs", sizes["in_features"]), ("outputs", sizes["out_features"])):
        left = entry.get(key)
        if left is not None and (type(left) is not int or not 1 <= left <= size):
            raise InputError(f"layer {name}: {key} {left!r:.80}, expected 1 to {size} channels or none taken out")


def _left(linear: nn.Linear, entry: Mapping[str, Any]) -> nn.Linear:
    """What is left of a linear, unfilled."""
    K, N = entry["inputs"] or entry["in_features"], entry["outputs"] or entry["out_features"]
    w = linear.weight
    return nn.Linear(K, N, entry["bias"], device=w.device, dtype=w.dtype).train(linear.training)


def _selected(linear: nn.Module, entry: Mapping[str, Any]) -> SelectedLinear:
    """A linear with channels taken out, which ones the state will say."""
    channels = [None if entry[key] is None else torch.arange(entry[key]) for key in ("inputs", "outputs")]
    return SelectedLinear(linear, entry["in_features"], entry["out_features"], *channels)


def _checked_mlp(modules: Mapping[str, nn.Module], name: str, entry: Mapping[str, Any]) -> Mlp:
    """The MLP that a file calls narrowed, if there is one and its width fits."""
    if name not in modules:
        raise InputError(f"{name!r} is no MLP of this model")
    mlp, width = read_mlp(modules[name], name), entry["width"]
    if type(width) is not int or not 1 <= width <= mlp.width:
        raise InputError(f"MLP {name}: width {width!r:.80}, expected 1 to {mlp.width}")
    return mlp


def _narrowed_sizes(mlp: Mlp, entry: Mapping[str, Any]) -> Iterator[tuple[nn.Module, dict[str, int]]]:
    """The sizes that narrowing will change, linear by linear."""
    for linear in mlp.fc1:
        yield linear, {"out_features": entry["width"] * (2 if mlp.packed else 1)}
    yield mlp.fc2, {"in_features": entry["width"]}


def _check_residual(name: str, entry: Mapping[str, Any]) -> None:
    """Raise `InputError` unless what a file says of a residual is a known form with a group size that fits."""
    if "residual" not in entry and "group_size" not in entry:
        return
    form, group_size, K = entry.get("residual"), entry.get("group_size"), entry["in_features"]
    if type(form) is not str or type(group_size) is not int or not 1 <= group_size <= K:
        raise InputError(
            f"layer {name}: residual {form!r:.80} with group size {group_size!r:.80}, expected a form and 1 to {K}"
        )
    check_form(f"layer {name}", entry["out_features"], K, form, group_size)
