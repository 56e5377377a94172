"""Self-attention whose value channels can be told apart: which linears make q, k and v, which one reads the heads."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitlr.nn import SelectedLinear
from vitlr.nn._fused import original_of
from vitlr.nn.fused_attention import CLASSES
from vitlr.nn.fused_projections import CLASSES as PROJECTIONS
from vitlr.runtime.modules import class_of, join

SUPPORTED = (
    "timm's ViT, EVA, BEiT and Swin attention, nn.MultiheadAttention, torchvision's Swin, and that of transformers' "
    "ViT, DeiT, DINOv2, CLIP, SigLIP and their like"
)

SCORES_SUPPORTED = (
    "timm's ViT, EVA, BEiT and Swin attention without norms of q and k, nn.MultiheadAttention, torchvision's Swin, and "
    "that of transformers' ViT, DeiT, DINOv2, CLIP, SigLIP and their like"
)

_OF = "transformers.models"
# Classes whose forward is known: channel j of what the projection reads is made from channel j of v alone, and scores
# are `q kᵀ` as the linears made q and k, but for what is added to or multiplies all of them;
_PLAIN = {
    "timm.layers.attention.Attention",
    "timm.models.vision_transformer.Attention",
    "timm.models.beit.Attention",
    "timm.models.cait.ClassAttn",
    "timm.models.davit.WindowAttention",
    "timm.models.hiera.MaskUnitAttention",
    "timm.models.pvt_v2.Attention",
    "timm.models.swin_transformer.WindowAttention",
    "timm.models.twins.GlobalSubSampleAttn",
    "timm.models.twins.LocallyGroupedAttn",
    "vitlr.nn.multihead_linears.MultiheadLinears",
    "vitlr.nn.window_linears.WindowLinears",
    *PROJECTIONS,
    f"{_OF}.beit.modeling_beit.BeitAttention",
    f"{_OF}.swin.modeling_swin.SwinAttention",
}
# the same of q and k that are turned by a token's place, in planes of two channels;
_TURNED = {
    "timm.layers.attention.AttentionRope",
    "timm.models.eva.EvaAttention",
    f"{_OF}.dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention",
}
# the same of v, but more is done to q and k.
_MORE = {
    "timm.models.swin_transformer_v2.WindowAttention",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",
}
# the same of q and k, but heads are mixed before and after the softmax, so that q and k of one serve all.
_MIXED = {"timm.models.cait.TalkingHeadAttn"}
_KNOWN = _PLAIN | _TURNED | _MORE | _MIXED
_POSITIONS = "tables of positions are multiplied by its queries as well, so these keep their channels"
_HEAD_BY_HEAD = "one linear makes q, k and v head by head, in rows that are not told apart"
_WIDER = (
    "a norm by batch stands between its linears and the scores, and its values, wider than queries and keys, pass an "
    "activation: all keep their channels"
)
_CHANNELS = "it attends to channels in place of tokens, so each of its queries and keys counts"
# Left alone, each for a reason of its own.
_UNKNOWN = {
    "timm.models.vision_transformer_sam.Attention": _POSITIONS,
    f"{_OF}.sam.modeling_sam.SamVisionAttention": _POSITIONS,
    f"{_OF}.sam.modeling_sam.SamVisionSdpaAttention": _POSITIONS,
    f"{_OF}.vitdet.modeling_vitdet.VitDetAttention": _POSITIONS,
    "timm.models.tiny_vit.Attention": _HEAD_BY_HEAD,
    "timm.models.levit.Attention": _WIDER,
    "timm.models.levit.AttentionDownsample": _WIDER,
    f"{_OF}.levit.modeling_levit.LevitAttention": _WIDER,
    f"{_OF}.levit.modeling_levit.LevitAttentionSubsample": _WIDER,
    "timm.models.xcit.XCA": _CHANNELS,
    "timm.models.davit.ChannelAttention": _CHANNELS,
    "timm.models.edgenext.CrossCovarianceAttn": _CHANNELS,
}
_KEYS_OF_FEWER = ("timm.models.pvt_v2.Attention", "timm.models.twins.GlobalSubSampleAttn")  # their norm is before k, v
_PARTS = (("qkv",), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("q", "kv"))
_OUT = ("proj", "o_proj", "out_proj")
_HEADS = ("num_heads", "num_attention_heads", "heads")
_MARK = "vitlr_full_heads"  # on an attention that lost heads: how many it had before


@dataclass(frozen=True)
class Attention:
    """One attention by the names of its linears: `inputs` read the tokens, `output` reads the heads side by side.

    Row `first + j` of the linear `value` makes channel j of the heads, `width` channels in all. `bias`: a parameter
    that is added to the queries behind their linear. `turned`: whether a token's place turns q and k in planes, which
    are "pairs" of neighbours or of channels of the two "halves" of a head.
    """

    name: str
    inputs: tuple[str, ...]
    value: str
    first: int
    output: str
    width: int
    heads: int
    bias: str = ""
    turned: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all its linears, the one that reads the heads last."""
        return (*self.inputs, self.output)

    @property
    def queries_keys(self) -> tuple[str, ...]:
        """Names of the linears that make queries and keys, and in the last one maybe the values too: one, or two."""
        return self.inputs[:2]

    @property
    def planes(self) -> Tensor:
        """Channels of one head that only go together, [planes, 2]."""
        channels = torch.arange(self.head_dim)
        return channels.view(2, -1).mT if self.turned == "halves" else channels.view(-1, 2)

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.heads

    def rows(self, keep: Tensor) -> dict[str, Tensor]:
        """The rows of `inputs` that stay, ascending, where only the channels `keep` of the heads do.

        Those of v go one by one. Those of q and k serve a whole head, and go with the last channel of it.
        """
        v = torch.zeros(self.width, dtype=torch.bool)
        v[keep.cpu()] = True
        qk = v.view(self.heads, -1).any(1).repeat_interleave(self.head_dim)
        parts = [qk, qk, v]
        before = len(self.inputs) - 1  # all that is left is made by the last linear
        made = [*parts[:before], torch.cat(parts[before:])]
        return {name: part.nonzero().flatten() for name, part in zip(self.inputs, made, strict=True)}

    def whole(self, keep: Tensor) -> bool:
        """Whether the channels `keep` are all those of some heads."""
        return len(keep.unique()) == len((keep // self.head_dim).unique()) * self.head_dim


def attentions(model: nn.Module) -> tuple[dict[str, Attention], dict[str, str]]:
    """The attentions of a model by name, and what looks like one but is left alone, each with the reason."""
    found: dict[str, Attention] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        if not _looks_like_one(module):
            continue
        if class_of(module) not in _KNOWN:
            unknown = f"{type(module).__qualname__} is not one that vitlr knows. Supported: {SUPPORTED}"
            refused[name] = _UNKNOWN.get(class_of(module), unknown)
            continue
        answer = _read(name, module)
        if isinstance(answer, str):
            refused[name] = answer
        else:
            found[name] = answer
    return found, refused


def measurable(model: nn.Module, linears: Container[str]) -> tuple[dict[str, Attention], dict[str, str]]:
    """The attentions whose channels can go, all of them among `linears`, and what keeps its width, with the reason."""
    found, refused = attentions(model)
    for name, attention in list(found.items()):
        if class_of(model.get_submodule(name)) in _MIXED:
            refused[name] = "it mixes its heads, so none of them stands alone"
            del found[name]
            continue
        outside = [linear for linear in attention.linears if linear not in linears]
        if outside:
            refused[name] = f"{outside[0]} is not among the layers that are measured"
            del found[name]
    return found, refused


def score_attentions(model: nn.Module, linears: Container[str]) -> dict[str, Attention]:
    """The attentions whose queries and keys can be rotated, their linears among `linears`."""
    refused = why_no_scores(model)
    return {
        name: attention
        for name, attention in attentions(model)[0].items()
        if name not in refused and all(linear in linears for linear in attention.queries_keys)
    }


def why_no_scores(model: nn.Module) -> dict[str, str]:
    """The attentions whose scores are not plain products of what the linears made, each with the reason."""
    found, refused = attentions(model)
    for name in found:
        module = model.get_submodule(name)
        if class_of(module) in _MORE or getattr(module, "cosine", False):
            refused[name] = f"{type(module).__qualname__} does more to queries and keys than multiply them"
        if getattr(module, "q_stride", 1) != 1:
            refused[name] = "it takes the largest of several queries"
        if isinstance(k_bias := getattr(module, "k_bias", None), Tensor) and not k_bias.is_meta and bool(k_bias.any()):
            refused[name] = "its k_bias is not zero"
        for norm in ("q_norm", "k_norm"):
            if type(getattr(module, norm, nn.Identity())) is not nn.Identity:
                refused[name] = f"its {norm} stands between the linear and the scores"
    return refused


def nothing(model: nn.Module, refused: Mapping[str, str], what: str = "value channels", supported: str = "") -> str:
    """Why a model has no attention that could lose channels, or what else it could lose."""
    reasons = [f"; {name}: {reason}" for name, reason in refused.items()]
    return (
        f"{type(model).__qualname__} has no attention whose {what} could go"
        f"{reasons[0] if reasons else ''}. Supported: {supported or SUPPORTED}"
    )


def _looks_like_one(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention) or class_of(module) in _KNOWN | _UNKNOWN.keys():
        return True
    children = dict(module.named_children())
    return any(out in children for out in _OUT) and any(part in children for part in ("qkv", "q_proj", "q", "kv"))


def _read(name: str, module: nn.Module) -> Attention | str:
    """The linears of a known attention, or why its channels are not one by one those of v."""
    children = dict(module.named_children())
    parts = next((parts for parts in _PARTS if all(part in children for part in parts)), None)
    out = next((part for part in _OUT if part in children), None)
    if parts is None or out is None:
        return f"it has no {' or '.join('/'.join(parts) for parts in _PARTS)} beside a {' or '.join(_OUT)}"
    if getattr(module, "gate", None) is not None:
        return "a gate of its own multiplies what its projection reads"
    if class_of(module) not in _KEYS_OF_FEWER and type(children.get("norm", nn.Identity())) is not nn.Identity:
        return "a norm over its heads makes every channel depend on all"
    taken = [part for part in (*parts, out) if isinstance(children[part], SelectedLinear)]
    if taken:
        return f"channels were taken out of {join(name, taken[0])} already"
    sizes = {part: _size(children[part], "out_features") for part in parts}
    width = _size(children[out], "in_features")
    heads = next((found for key in _HEADS if type(found := getattr(module, key, None)) is int), 0)
    rows = [width] * (len(parts) - 1)
    if list(sizes.values()) != [*rows, 3 * width - sum(rows)] or heads < 1 or width % heads:
        return f"its heads share keys and values ({sizes} rows for {width} channels in {heads} heads)"
    inputs = tuple(join(name, part) for part in parts)
    bare = (
        isinstance(getattr(module, "q_bias", None), nn.Parameter) and getattr(children[parts[0]], "bias", None) is None
    )
    bias = join(name, "q_bias") if bare else ""
    turned = "" if class_of(module) not in _TURNED else "halves" if _halves(module) else "pairs"
    first = 3 * width - width * len(parts)
    return Attention(name, inputs, inputs[-1], first, join(name, out), width, heads, bias, turned)


def _halves(module: nn.Module) -> bool:
    """Whether channel j of a head is turned together with j + d/2: as timm says, and always in transformers."""
    return bool(getattr(module, "rotate_half", not class_of(module).startswith("timm.")))


def loses_heads(module: nn.Module) -> bool:
    """Whether the forward of an attention is exact with fewer heads; else zeros stand for those that are gone.

    timm's `Attention` is, since it reads its own `attn_dim`; others take the width of their input for it.
    """
    return class_of(module) in CLASSES and type(getattr(module, "attn_dim", None)) is int


def set_heads(module: nn.Module, heads: int) -> None:
    """Give an attention whose linears lost rows and columns fewer heads, and remember how many it had."""
    before = int(module.num_heads)  # type: ignore[arg-type]
    setattr(module, _MARK, getattr(module, _MARK, before))
    module.attn_dim = int(module.attn_dim) // before * heads  # type: ignore[assignment,arg-type]
    module.num_heads = heads  # type: ignore[assignment]


def fewer_heads(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Attentions that lost heads, by name: (heads now, heads before)."""
    owners = {name: original_of(module) for name, module in model.named_modules()}
    marked = {name: owner for name, owner in owners.items() if hasattr(owner, _MARK)}
    return {name: (int(m.num_heads), int(getattr(m, _MARK))) for name, m in marked.items()}  # type: ignore[arg-type]


def attention_names(model: nn.Module) -> Iterator[str]:
    """Names of the linears of every attention that vitlr knows, in module order."""
    for attention in attentions(model)[0].values():
        yield from attention.linears


def _size(module: nn.Module, key: str) -> int:
    size = getattr(module, key, 0)
    return size if isinstance(size, int) else 0
