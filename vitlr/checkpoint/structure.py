"""What was done to a dense model, as plain values, and the same done again to a dense one, unfilled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.anatomy import linears
from vitlr.anatomy.attention import Attention, fewer_heads, loses_heads
from vitlr.anatomy.attention import attentions as known_attentions
from vitlr.anatomy.mlps import Mlp, narrowed_mlps, read_mlp
from vitlr.errors import InputError
from vitlr.nn import LowRankLinear, QuantizedLinear, ResidualLowRankLinear, SelectedLinear
from vitlr.ops.layers.lowrank_residual_linear import check_form
from vitlr.pruning import narrow_mlp
from vitlr.runtime.modules import swap
from vitlr.surgery.attention import narrow_attention


def structure(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What was done to a dense model, as plain values.

    `{mlp: {"width"}}` for narrowed MLPs, `{attention: {"heads"}}` for attentions that lost heads, `{linear: {"inputs",
    "outputs", "in_features", "out_features", "bias"}}` for linears with channels taken out (how many are left, or
    None), `{linear: {"rank", "in_features", "out_features", "bias"}}` for low-rank layers; those with a residual have
    its `"residual"` (the form) and `"group_size"` as well. Layers of integers have `"quantized"` in the rank's place.
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
    layers |= {
        name: {
            "quantized": True,
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.bias is not None,
        }
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    selected = {name: module.describe() for name, module in model.named_modules() if isinstance(module, SelectedLinear)}
    widths = {name: {"width": mlp.width} for name, mlp in narrowed_mlps(model).items()}
    heads = {name: {"heads": now} for name, (now, _) in fewer_heads(model).items()}
    return {**widths, **heads, **selected, **layers}


def restructure(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Narrow the named MLPs and attentions, take channels out of linears, put low-rank ones in: unfilled, in place.

    Device and dtype stay. Raises `InputError` for names that are no such MLP or no plain linear, shapes that do not
    fit, and widths, channels and ranks out of range; the model is then untouched.
    """
    modules = dict(model.named_modules())
    widths = {name: entry for name, entry in layers.items() if isinstance(entry, Mapping) and "width" in entry}
    selections = {name: entry for name, entry in layers.items() if isinstance(entry, Mapping) and "inputs" in entry}
    heads = {name: entry for name, entry in layers.items() if isinstance(entry, Mapping) and "heads" in entry}
    others = {*widths, *selections, *heads}
    factors = {name: entry for name, entry in layers.items() if name not in others}
    mlps = {name: _checked_mlp(modules, name, entry) for name, entry in widths.items()}
    sizes = {id(module): new for mlp in mlps.values() for module, new in _narrowed_sizes(mlp, widths[mlp.name])}
    attentions = {name: _checked_attention(model, name, entry) for name, entry in heads.items()}
    for attention, keep in attentions.values():
        rows = attention.rows(keep)
        sizes |= {id(modules[name]): {"out_features": len(rows[name])} for name in attention.inputs}
        sizes[id(modules[attention.output])] = {"in_features": len(keep)}
    for name, entry in selections.items():
        linear = modules[name] = _checked_linear(modules, name)
        _check_selection(name, {**_sizes(linear), **sizes.get(id(linear), {})}, entry)
        modules[f"{name}.linear"] = _left(linear, entry)
    for name, entry in factors.items():
        linear = _checked_linear(modules, name)
        expected = {**_sizes(linear), **sizes.get(id(linear), {})}
        if not isinstance(entry, Mapping) or {key: entry.get(key) for key in expected} != expected:
            raise InputError(f"layer {name}: expected {expected}, the file says {entry!r}")
        rank, bias = entry.get("rank"), entry.get("bias")
        if "quantized" in entry:
            if entry["quantized"] is not True or type(bias) is not bool:
                raise InputError(
                    f"layer {name}: quantized and bias must be true or false, the file says {entry!r:.200}"
                )
            continue
        limit = min(expected.values())
        if type(rank) is not int or not 1 <= rank <= limit or type(bias) is not bool:
            raise InputError(
                f"layer {name}: rank {rank!r} with bias {bias!r}, expected a rank from 1 to {limit} and true or false"
            )
        _check_residual(name, entry)
    linears.make_visible(model)
    with torch.no_grad():
        for name, mlp in mlps.items():
            narrow_mlp(mlp, torch.arange(widths[name]["width"]))
        for attention, keep in attentions.values():
            narrow_attention(model, attention, keep)
        for name, entry in selections.items():
            swap(model, name, _selected(modules[f"{name}.linear"], entry))
        for name, entry in factors.items():
            swap(model, name, _factored(modules[name], entry).train(modules[name].training))
    return model


def _checked_linear(modules: Mapping[str, nn.Module], name: str) -> nn.Linear:
    """The plain linear of that name, if there is one."""
    linear = modules.get(name)
    if type(linear) is not nn.Linear:
        raise InputError(f"layer {name!r} is no linear layer of this model")
    return linear


def _factored(linear: nn.Module, entry: Mapping[str, Any]) -> nn.Module:
    """The layer of factors or of integers that stands for a linear, unfilled."""
    like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    shape = entry["in_features"], entry["out_features"]
    if "quantized" in entry:
        return QuantizedLinear(*shape, entry["bias"], **like)
    if "residual" in entry:
        return ResidualLowRankLinear(
            *shape, entry["rank"], entry["residual"], entry["group_size"], entry["bias"], **like
        )
    return LowRankLinear(*shape, entry["rank"], entry["bias"], **like)


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


def _checked_attention(model: nn.Module, name: str, entry: Mapping[str, Any]) -> tuple[Attention, Tensor]:
    """An attention that a file says has fewer heads, with as many of its channels, if it can."""
    attention, heads = known_attentions(model)[0].get(name), entry["heads"]
    if attention is None or not loses_heads(model.get_submodule(name)):
        raise InputError(f"{name!r} is no attention of this model that could lose heads")
    if type(heads) is not int or not 1 <= heads <= attention.heads:
        raise InputError(f"attention {name}: {heads!r:.80} heads, expected 1 to {attention.heads}")
    return attention, torch.arange(heads * attention.head_dim)


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
