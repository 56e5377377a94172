"""What names and classes tell of any `nn.Module`: heads, embeddings, tables, weights that nobody can replace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from vitlr.nn import MultiheadLinears
from vitlr.runtime.modules import join

_HEADS = re.compile(r"((\w+_)?heads?(_\w+|\d+)?|fc|logits|score|\w*classifier|(visual|text)_projection)")
_EMBEDDING = re.compile(
    r"(^|\.)(\w*patch_(to_)?(embed|proj|token)\w*|pixel_embed|embeddings?|embeds?|stem|patchify|tokenizer)(\.|$)"
)
_TABLE = re.compile(
    r"(^|\.)(cpb_mlp|meta_mlp|continuous_position_bias_mlp|rel(ative)?_pos\w*|pos_(embed|proj|bias)\w*|rope\w*)(\.|$)"
)

# Modules whose forward hands `self.<child>.weight` to a function: hooks never fire and a replacement is never called.
_BYPASSING = {
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): ("qkv", "proj"),
    ("xformers.ops.swiglu_op", "SwiGLU"): ("w1", "w2", "w12", "w3"),
    ("torch.nn.modules.activation", "MultiheadAttention"): ("out_proj",),
    ("torch.nn.modules.transformer", "TransformerEncoderLayer"): ("linear1", "linear2"),
}


@dataclass(frozen=True)
class Hidden:
    """A weight that cannot be replaced: why, and how many parameters it holds."""

    reason: str
    parameters: int

    def __str__(self) -> str:
        return f"{self.reason} ({self.parameters:,} parameters)"


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Return the last linear of each child of `model` with a classifier's usual name (head, fc, classifier, ...).

    A list or dict of heads holds one for each task.
    """
    found: list[nn.Module] = []
    for name, child in model.named_children():
        several = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        for head in child.children() if several else (child,):
            linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
            if _HEADS.fullmatch(name) and linears:
                found.append(linears[-1])
    return found or _behind_blocks(model)


def own_heads(model: nn.Module) -> list[nn.Module]:
    """The last linear of each child with a classifier's name that is a linear or an `nn.Sequential`, as one adds it."""
    children = [child for name, child in model.named_children() if _HEADS.fullmatch(name)]
    plain = [child for child in children if type(child) in (nn.Linear, nn.Sequential)]
    return [found[-1] for child in plain if (found := [m for m in child.modules() if isinstance(m, nn.Linear)])]


def _behind_blocks(model: nn.Module) -> list[nn.Module]:
    """The last linear of all, where it stands behind a stack of blocks: a head by whatever name.

    One that was made before the blocks is known by its widths: from that of the blocks to another.
    Not of transformers' models, which end in poolers and whose heads have known names.
    """
    if hasattr(getattr(model, "config", None), "model_type"):
        return []
    linears: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    inside: set[int] = set()
    for stack in model.modules():
        blocks = [m for m in stack.children() if not isinstance(m, nn.Linear) and _has_linears(m)]
        if isinstance(stack, (nn.ModuleList, nn.Sequential)) and len(blocks) > 1:
            kinds = {type(m) for m in blocks}
            inside |= {id(m) for b in blocks if len(kinds) == 1 for m in b.modules()}
    if inside and id(linears[-1]) not in inside:
        return linears[-1:]
    width = linears[-1].out_features if linears else 0
    ahead = [m for m in linears if id(m) not in inside and m.in_features == width != m.out_features]
    return ahead if inside and len(ahead) == 1 else []


def _has_linears(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear) for m in module.modules())


def role(name: str) -> str | None:
    """Say why a linear of this qualified name stays dense by default, or None."""
    if _EMBEDDING.search(name):
        return "an embedding"
    if _TABLE.search(name):
        return "computes a table of positions, it sees no image"
    return None


def bypassed(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (name, reason) of the linears that their parent never calls but reads `.weight` of, with no remedy."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "self_attn", None), MultiheadLinears):  # then torch's encoder layer calls them
            continue
        for base in type(module).__mro__:
            for child in _BYPASSING.get((base.__module__, base.__qualname__), ()):
                if isinstance(getattr(module, child, None), nn.Module):
                    yield join(name, child), f"{base.__qualname__} reads its weight without calling it"


def packed(model: nn.Module) -> Iterator[tuple[str, Hidden]]:
    """Yield the projections that are a bare parameter (`in_proj_weight` and its kin) and no linear at all."""
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if re.fullmatch(r"(in|q|k|v)_proj_weight", key):
                reason = f"{type(module).__qualname__} holds it as a bare parameter, not as an nn.Linear"
                yield join(name, key), Hidden(reason, parameter.numel())


def weights_of_many(model: nn.Module) -> dict[int, list[str]]:
    """Map the id of each parameter that two or more modules own (tied weights) to its qualified names."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(join(name, key))
    return {key: names for key, names in owners.items() if len(names) > 1}


def unusual(linear: nn.Linear) -> str | None:
    """Say why a linear is not a plain one whose weight may be replaced by factors, or None."""
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__qualname__}, not exactly nn.Linear"
    weight = linear._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters"
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, not a plain floating-point parameter"
    return None
