"""How the arguments that timm's models are made with are read off a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from vitlr.nn._fused import original_of
from vitlr.nn._fused_mlp import activation_name

_NAMED = {"gelu", "gelu_tanh", "quick_gelu", "silu", "relu"}  # of activations, called the same by timm


def _channels(model: nn.Module) -> Any:
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)


def _size(model: nn.Module) -> Any:
    return getattr(getattr(model, "patch_embed", None), "img_size", getattr(model, "img_size", None))


def _pool(model: nn.Module) -> Any:
    pool = getattr(model, "global_pool", None)
    head = getattr(getattr(model, "head", None), "global_pool", None)
    return next((p for p in (getattr(head, "pool_type", None), head, pool) if isinstance(p, str)), None)


def _rate(holder: str) -> Callable[[nn.Module], Any]:
    """The largest rate among modules of that name: of a drop path it is the last one's, rates rise to it."""

    def read(model: nn.Module) -> Any:
        rates = []
        for name, module in model.named_modules():
            if re.fullmatch(holder, name.rpartition(".")[2]):
                rate = getattr(module, "drop_prob", getattr(module, "p", getattr(module, "prob", None)))
                rates += [rate] if isinstance(rate, float) else []
        return round(max(rates, default=0.0), 6)  # float32 steps of a schedule

    return read


def _normed(name: str) -> Callable[[nn.Module], Any]:
    """Whether the first module of that name is a norm, not what stands where there is none."""
    return lambda model: next(
        (not isinstance(m, nn.Identity) for n, m in model.named_modules() if n.rpartition(".")[2] == name), None
    )


def _fc_norm(model: nn.Module) -> Any:
    """Whether a norm stands behind the pooling, None where timm decides by itself: behind an average there is one."""
    found = _normed("fc_norm")(model)
    return None if found is (_pool(model) in ("avg", "avgmax", "max")) else found


def _scaled(model: nn.Module) -> Any:
    """Where layer scales begin, which is of no matter; only that there are some."""
    return 1e-5 if any(type(m).__name__ == "LayerScale" for m in model.modules()) else None


def _own(name: str) -> Callable[[nn.Module], Any]:
    """What the model, or its patch embedding, holds under that name."""
    return lambda model: getattr(model, name, getattr(getattr(model, "patch_embed", None), name, None))


def head_width(model: nn.Module) -> Any:
    """The classes of the head that is there; what a model says of itself goes stale when a head is put in its place."""
    head = getattr(model, "get_classifier", lambda: None)()
    return head.out_features if isinstance(head, nn.Linear) else getattr(model, "num_classes", None)


def _blocks(model: nn.Module) -> Any:
    """How many blocks there are in one row; hierarchies have stages."""
    blocks = getattr(model, "blocks", None)
    return len(blocks) if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else None


def _heads(model: nn.Module) -> Any:
    """By the scale of the scores, which stays where heads, queries and keys are taken out."""
    width, attention = getattr(model, "embed_dim", None), getattr(next(iter(_row(model)), None), "attn", None)
    scale = getattr(original_of(attention), "scale", None) if isinstance(attention, nn.Module) else None
    return round(width * scale**2) if isinstance(width, int) and isinstance(scale, float) else None


def _row(model: nn.Module) -> Any:
    return model.blocks if _blocks(model) else ()


def _act(model: nn.Module) -> Any:
    """The first activation of an MLP by timm's name, None for one that has none here."""
    found = next((m for n, m in model.named_modules() if n.endswith("mlp.act")), None)
    name = None if found is None else activation_name(found)
    return name if name in _NAMED else None


# How arguments that fine-tunes are made with are read off a model.
READ: dict[str, Callable[[nn.Module], Any]] = {
    "num_classes": head_width,
    "in_chans": _channels,
    "depth": _blocks,
    "embed_dim": _own("embed_dim"),
    "num_heads": _heads,
    "patch_size": _own("patch_size"),
    "act_layer": _act,
    "img_size": _size,
    "global_pool": _pool,
    "drop_path_rate": _rate(r"drop_path\d*"),
    "drop_rate": _rate("head_drop|drop"),
    "pos_drop_rate": _rate("pos_drop"),
    "patch_drop_rate": _rate("patch_drop"),
    "attn_drop_rate": _rate("attn_drop"),
    "proj_drop_rate": _rate("proj_drop"),
    "dynamic_img_size": _own("dynamic_img_size"),
    "dynamic_img_pad": _own("dynamic_img_pad"),
    "class_token": _own("has_class_token"),
    "reg_tokens": _own("num_reg_tokens"),
    "no_embed_class": _own("no_embed_class"),
    "init_values": _scaled,
    "qk_norm": _normed("q_norm"),
    "pre_norm": _normed("norm_pre"),
    "fc_norm": _fc_norm,
}
