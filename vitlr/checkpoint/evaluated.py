"""What of a module counts in eval mode: its class and plain values, without what only training looks at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

# How, not what, a module computes; classes and channels, which the layers tell; `alien`'s guard; how weights began.
_HOW = {"training", "grad_checkpointing", "fused_attn", "weight_init_mode"}
_NO_MATTER = frozenset({*_HOW, "num_classes", "in_chans", "save_pretrained"})
_NOTHING = re.compile(r"Identity|StochasticDepth|\w*Drop(out|Path|Block)\w*")  # these hand on what they are given
_RATE = re.compile(r"\w*drop\w*")
_BEGINNINGS = {"init_values", "layer_scale_init_value", "head_init_scale"}  # where weights began, not where they are
_UNSEEN = {*_BEGINNINGS, "inplace"}
# timm's own classes, which it takes where a layer is given by its name, as torch's that compute the same.
_AS_OF_TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "timm.layers.activations.GELU": ("GELU", {"approximate": "none"}),
    "timm.layers.activations.GELUTanh": ("GELU", {"approximate": "tanh"}),
    "timm.layers.activations.Sigmoid": ("Sigmoid", {}),
    "timm.layers.activations.Tanh": ("Tanh", {}),
    "timm.layers.norm.LayerNorm": ("LayerNorm", {}),
}
_BARE = {name.rpartition(".")[2]: found for name, found in _AS_OF_TORCH.items()}


def scalars(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(module).items():
        if key.startswith(("_", "vitlr_")) or key in _NO_MATTER:
            continue
        value = tuple(value) if isinstance(value, list) else value
        flat = value if isinstance(value, tuple) else (value,)
        if all(item is None or isinstance(item, (bool, int, float, str)) for item in flat):
            yield key, value
        elif callable(value) and hasattr(value, "__qualname__"):
            yield key, f"{value.__module__}.{value.__qualname__}"


def in_evaluation(kind: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class (with its module or without) and the values of a module, as far as it computes by them in eval mode.

    Dropout, drop paths and identities are one, whatever their rates; so are equal layers of timm and torch.
    """
    name = kind.rpartition(".")[2]
    if _NOTHING.fullmatch(name):
        return "Identity", {}
    known = (_AS_OF_TORCH if name != kind else _BARE).get(kind)
    if known is None and kind.startswith("torch.nn."):
        known = name, {}
    kept = {key: value for key, value in values.items() if key not in _UNSEEN and not _is_rate(key, value)}
    return (kind, kept) if known is None else (known[0], known[1] | kept)


def _is_rate(key: str, value: Any) -> bool:
    return _RATE.fullmatch(key) is not None and not isinstance(value, bool) and isinstance(value, (int, float))
