"""What was done to a dense model, as plain values, and the same done again to a dense one, unfilled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from vitlr.anatomy import visibility
from vitlr.anatomy.attention import attentions as known_attentions
from vitlr.anatomy.attention import fewer_heads, loses_heads
from vitlr.anatomy.mlps import narrower_mlps, read_mlp
from vitlr.errors import InputError
from vitlr.nn import (
    Int8Linear,
    LowRankLinear,
    QuantizedLinear,
    ResidualLowRankLinear,
    SelectedLinear,
    TokenInt8Linear,
)
from vitlr.ops.layers.lowrank_residual_linear import check_form
from vitlr.pruning import narrow_mlp
from vitlr.runtime.kinds import FLAG, NAME, PLAIN, check, whole
from vitlr.runtime.modules import swap
from vitlr.surgery.attention import narrow_attention

Entry = Mapping[str, Any]
Do = Callable[[], Any]  # what is left to do once all is checked

_SIZES = {"in_features": whole(0), "out_features": whole(0), "bias": FLAG}
_MOST_WIDE = 2**12  # columns that wide channels may have more
ENTRIES: dict[str, dict[str, Any]] = {
    "width": {"width": PLAIN},
    "heads": {"heads": PLAIN},
    "inputs": {"inputs": PLAIN, "outputs": PLAIN, **_SIZES},
    "quantized": {"quantized": FLAG, "twice?": whole(1), **_SIZES},
    "rank": {
        "rank": PLAIN,
        "residual?": NAME,
        "group_size?": whole(0),
        "factors?": NAME,
        "twice?": [whole(0)],
        **_SIZES,
    },
    "int8": {"int8": FLAG, "wide?": whole(1, _MOST_WIDE), "token?": FLAG, **_SIZES},
}
"""What an entry of each kind holds; what is left of a model, and whether it fits, is for the change itself to say."""


def structure(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What was done to a dense model, as plain values.

    `{mlp: {"width"}}` for narrowed MLPs, `{attention: {"heads"}}` for attentions that lost heads, `{linear: {"inputs",
    "outputs", "in_features", "out_features", "bias"}}` for linears with channels taken out (how many are left, or
    None), `{linear: {"rank", "in_features", "out_features", "bias"}}` for low-rank layers; those with a residual have
    its `"residual"` (the form) and `"group_size"` as well, those of integers `"factors": "quantized"`. Dense layers of
    integers have `"quantized"` in the rank's place, those that multiply bytes `"int8"`, how many further columns their
    `"wide"` channels have, and `"token"` where they go by the range of every token.
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
                else {"factors": "quantized", "twice": [_twice(module.down), _twice(module.up)]}
                if _of_integers(module)
                else {}
            ),
        }
        for name, module in model.named_modules()
        if isinstance(module, (LowRankLinear, ResidualLowRankLinear))
    }
    factors = {
        id(child) for module in model.modules() if isinstance(module, LowRankLinear) for child in module.children()
    }
    layers |= {
        name: {
            "quantized": True,
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.bias is not None,
            **({"twice": _twice(module)} if _twice(module) else {}),
        }
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and id(module) not in factors
    }
    layers |= {
        name: {
            "int8": True,
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": True,
            **({} if module.wide is None else {"wide": len(module.wide)}),
            **({"token": True} if isinstance(module, TokenInt8Linear) else {}),
        }
        for name, module in model.named_modules()
        if isinstance(module, Int8Linear)
    }
    selected = {name: module.describe() for name, module in model.named_modules() if isinstance(module, SelectedLinear)}
    widths = {name: {"width": width} for name, (width, _) in narrower_mlps(model).items()}
    heads = {name: {"heads": now} for name, (now, _) in fewer_heads(model).items()}
    return {**widths, **heads, **selected, **layers}


def restructure(model: nn.Module, layers: Mapping[str, Entry]) -> nn.Module:
    """Narrow the named MLPs and attentions, take channels out of linears, put low-rank ones in: unfilled, in place.

    Device and dtype stay. Raises `InputError` for names that are no such MLP or no plain linear, shapes that do not
    fit, and widths, channels and ranks out of range; the model is then untouched.
    """
    kinds = {name: _kind(entry) for name, entry in layers.items()}
    for name, kind in kinds.items():
        check(layers[name], ENTRIES[kind], f"layer {name}")
    with visibility.visible(model, keep=True):
        dense = _Dense(model)
        of_kinds = ((change, name) for kind, change in CHANGES.items() for name in layers if kinds[name] == kind)
        changes = [change(dense, name, layers[name]) for change, name in of_kinds]
    with torch.no_grad():
        for do in changes:
            do()
    visibility.put_back(model)
    return model


class _Dense:
    """The model before any change: its modules, those that a change will make, and the sizes that one will leave."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modules = model, dict(model.named_modules())
        self.narrowed: dict[int, dict[str, int]] = {}

    def linear(self, name: str) -> nn.Linear:
        """The plain linear of that name, if there is one."""
        linear = self.modules.get(name)
        if type(linear) is not nn.Linear:
            raise InputError(f"layer {name!r} is no linear layer of this model")
        return linear

    def sizes(self, linear: nn.Linear) -> dict[str, int]:
        """Those that a linear has once MLPs and attentions are narrow."""
        now = {"in_features": linear.in_features, "out_features": linear.out_features}
        return {**now, **self.narrowed.get(id(linear), {})}


def _narrow(dense: _Dense, name: str, entry: Entry) -> Do:
    """An MLP that is narrower."""
    if name not in dense.modules:
        raise InputError(f"{name!r} is no MLP of this model")
    mlp, width = read_mlp(dense.modules[name], name), entry["width"]
    if type(width) is not int or not 1 <= width <= mlp.width:
        raise InputError(f"MLP {name}: width {width!r:.80}, expected 1 to {mlp.width}")
    dense.narrowed |= {id(linear): {"out_features": width * (2 if mlp.packed else 1)} for linear in mlp.fc1}
    dense.narrowed[id(mlp.fc2)] = {"in_features": width}
    return lambda: narrow_mlp(mlp, torch.arange(width))


def _fewer_heads(dense: _Dense, name: str, entry: Entry) -> Do:
    """An attention that has fewer heads: as many of its channels, which ones the state will say."""
    attention, heads = known_attentions(dense.model)[0].get(name), entry["heads"]
    if attention is None or not loses_heads(dense.model.get_submodule(name)):
        raise InputError(f"{name!r} is no attention of this model that could lose heads")
    if type(heads) is not int or not 1 <= heads <= attention.heads:
        raise InputError(f"attention {name}: {heads!r:.80} heads, expected 1 to {attention.heads}")
    keep = torch.arange(heads * attention.head_dim)
    rows = attention.rows(keep)
    dense.narrowed |= {id(dense.modules[name]): {"out_features": len(rows[name])} for name in attention.inputs}
    dense.narrowed[id(dense.modules[attention.output])] = {"in_features": len(keep)}
    return lambda: narrow_attention(dense.model, attention, keep)


def _select(dense: _Dense, name: str, entry: Entry) -> Do:
    """A linear with channels taken out, which ones the state will say; what is left of it may have low rank."""
    linear = dense.linear(name)
    sizes = dense.sizes(linear)
    if {key: entry.get(key) for key in sizes} != sizes or type(entry.get("bias")) is not bool:
        raise InputError(f"layer {name}: expected {sizes} and a bias or none, the file says {entry!r}")
    for key, size in (("inputs", sizes["in_features"]), ("outputs", sizes["out_features"])):
        count = entry.get(key)
        if count is not None and (type(count) is not int or not 1 <= count <= size):
            raise InputError(f"layer {name}: {key} {count!r:.80}, expected 1 to {size} channels or none taken out")
    K, N = entry["in_features"], entry["out_features"]
    left = _like(linear, nn.Linear, entry["inputs"] or K, entry["outputs"] or N, entry["bias"])
    dense.modules[f"{name}.linear"] = left
    channels = [None if entry[key] is None else torch.arange(entry[key]) for key in ("inputs", "outputs")]
    return lambda: swap(dense.model, name, SelectedLinear(left, K, N, *channels))


def _factorise(dense: _Dense, name: str, entry: Entry) -> Do:
    """A linear of low rank, with a residual or without."""
    linear = dense.linear(name)
    expected = dense.sizes(linear)
    if not isinstance(entry, Mapping) or {key: entry.get(key) for key in expected} != expected:
        raise InputError(f"layer {name}: expected {expected}, the file says {entry!r}")
    rank, bias = entry.get("rank"), entry.get("bias")
    limit = min(expected.values())
    if type(rank) is not int or not 1 <= rank <= limit or type(bias) is not bool:
        raise InputError(
            f"layer {name}: rank {rank!r} with bias {bias!r}, expected a rank from 1 to {limit} and true or false"
        )
    _check_residual(name, entry)
    shape = (entry["in_features"], entry["out_features"], rank)
    if "residual" in entry:
        form = entry["residual"], entry["group_size"]
        return lambda: swap(dense.model, name, _like(linear, ResidualLowRankLinear, *shape, *form, bias))
    if entry.get("factors", "quantized") != "quantized":
        raise InputError(f"layer {name}: factors {entry['factors']!r:.80}, expected quantized or none")
    if "factors" in entry:
        (K, N, r), twice = shape, entry.get("twice", [0, 0])
        if len(twice) != 2 or twice[0] > K or twice[1] > r:
            raise InputError(f"layer {name}: twice is {twice!r:.40}, its factors have {K} and {r} columns")
        pair = (
            partial(_like, linear, QuantizedLinear, K, r, False, twice=twice[0]),
            partial(_like, linear, QuantizedLinear, r, N, bias, twice=twice[1]),
        )
        return lambda: swap(
            dense.model, name, LowRankLinear.from_layers(*(make() for make in pair)).train(linear.training)
        )
    dense.modules[f"{name}.down"] = _like(linear, nn.Linear, shape[0], rank, False)  # which may be of bytes
    dense.modules[f"{name}.up"] = _like(linear, nn.Linear, rank, shape[1], bias)
    return lambda: swap(dense.model, name, _like(linear, LowRankLinear, *shape, bias))


def _of_integers(module: nn.Module) -> bool:
    """Whether both factors of a low-rank layer are integers."""
    return isinstance(module, LowRankLinear) and isinstance(module.up, QuantizedLinear)


def _twice(module: nn.Module) -> int:
    """Columns of a layer of integers whose codes take two bytes."""
    return len(module.twice) if isinstance(module, QuantizedLinear) and module.twice is not None else 0


def _quantise(dense: _Dense, name: str, entry: Entry) -> Do:
    """A linear of integers."""
    linear = dense.linear(name)
    expected = {**dense.sizes(linear), "quantized": True}
    if {key: entry.get(key) for key in expected} != expected or type(entry.get("bias")) is not bool:
        raise InputError(f"layer {name}: expected {expected} and a bias or none, the file says {entry!r:.200}")
    shape, twice = (entry["in_features"], entry["out_features"], entry["bias"]), entry.get("twice", 0)
    if twice > entry["in_features"]:
        raise InputError(f"layer {name}: twice is {twice}, it has {entry['in_features']} columns")
    return lambda: swap(dense.model, name, _like(linear, QuantizedLinear, *shape, twice=twice))


def _multiply_bytes(dense: _Dense, name: str, entry: Entry) -> Do:
    """A linear that multiplies bytes."""
    linear = dense.linear(name)
    expected = {**dense.sizes(linear), "int8": True, "bias": True}
    if {key: entry.get(key) for key in expected} != expected:
        raise InputError(f"layer {name}: expected {expected}, the file says {entry!r:.200}")
    shape, wide = (entry["in_features"], entry["out_features"]), entry.get("wide", 0)
    kind = TokenInt8Linear if entry.get("token") else Int8Linear
    return lambda: swap(dense.model, name, _like(linear, kind, *shape, wide=wide))


CHANGES: dict[str, Callable[[_Dense, str, Entry], Do]] = {
    "width": _narrow,
    "heads": _fewer_heads,
    "inputs": _select,
    "quantized": _quantise,
    "rank": _factorise,
    "int8": _multiply_bytes,
}
"""By the key that tells an entry's kind, in the order in which they are done: one may change what those before left."""


def _kind(entry: Any) -> str:
    """The kind of change that an entry speaks of; low rank where it is none of the others."""
    return next((kind for kind in CHANGES if isinstance(entry, Mapping) and kind in entry), "rank")


def _like(linear: nn.Linear, kind: Callable[..., nn.Module], *arguments: Any, **more: Any) -> nn.Module:
    """A module of that kind where the linear is, of its dtype and mode."""
    made = kind(*arguments, **more, device=linear.weight.device, dtype=linear.weight.dtype)
    return made.train(linear.training)


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
