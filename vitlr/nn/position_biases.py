"""How attentions with a bias of positions make q, k, v and that bias from their input, class by class.

Every `make` gives `q, k, v [B, H, N, d]` and a bias that broadcasts to [B, H, N, N], or none, such that scores are
`q kᵀ / √d + bias`; `self` holds the children, parameters and buffers of the class under their names. Queries may be
pooled to fewer, and blocks go on from the size of their grid. `finish` makes the answer of what was attended to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlr.errors import InputError
from vitlr.nn._attend import BIASES, packed, split

_LARGEST = math.log(100.0)  # of logit_scale, the logarithm of what cosines are multiplied by


class Made(NamedTuple):
    """What is multiplied: `softmax(q kᵀ / √d + bias) v`; `size`: rows and columns of pooled queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    size: list[int] | None = None


def _out(self: Any, x: Tensor, y: Tensor, made: Made) -> Tensor:
    """Its last linear, whatever that is called."""
    out = self.get_submodule("o_proj" if "o_proj" in self._modules else "proj")(y.view(*x.shape[:-1], -1))
    return self.get_submodule("proj_drop")(out) if "proj_drop" in self._modules else out


def _pair(self: Any, x: Tensor, y: Tensor, made: Made) -> tuple[Tensor, None]:
    return _out(self, x, y, made), None


def _bare(self: Any, x: Tensor, y: Tensor, made: Made) -> tuple[Tensor]:
    return (y,)


def _bare_pair(self: Any, x: Tensor, y: Tensor, made: Made) -> tuple[Tensor, None]:
    return y, None


def _multi_scale_out(self: Any, x: Tensor, y: Tensor, made: Made) -> tuple[Tensor, list[int] | None]:
    return self.proj(y + made.q.transpose(1, 2).flatten(2) if self.residual_pooling else y), made.size


class Form(NamedTuple):
    """One class: `make(self, x, ...)`, what it must have, what it may have, and how it answers."""

    make: Callable[..., Made]
    children: tuple[str, ...]
    own: tuple[str, ...] = ()  # parameters and buffers
    kept: tuple[str, ...] = ("num_heads",)  # plain attributes
    optional: tuple[str, ...] = ()  # children
    finish: Callable[[Any, Tensor, Tensor, Made], Any] = _out


def _by_table(table: Tensor, index: Tensor) -> Tensor:
    """Entry `index[m, n]` of a table [entries, heads] for every head, [1, heads, N, N]."""
    return table.mT[:, index.flatten()].view(1, -1, *index.shape)


def _windows(bias: Tensor, mask: Tensor | None, windows: int) -> Tensor:
    """The bias, and what a mask [windows of an image, N, N] adds to it in each of so many windows."""
    return bias if mask is None else (bias + mask[:, None]).repeat(windows // mask.shape[0], 1, 1, 1)


def cosines(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """q and k whose scores are cosines times `exp(scale)`, one of each head."""
    factor = scale.clamp(max=_LARGEST).exp().view(-1, 1, 1) * math.sqrt(q.shape[-1])
    return F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1)


def _by_axes(q: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """`q · R[y - y'] + q · C[x - x']` of tokens (y, x) and (y', x'), [B, H, N, N]; q unscaled."""
    R, C = _differences(rows, height), _differences(columns, width)
    grid = q.unflatten(2, (height, width))
    down, right = torch.einsum("bnhwc,hkc->bnhwk", grid, R), torch.einsum("bnhwc,wkc->bnhwk", grid, C)
    return (down[..., :, None] + right[..., None, :]).flatten(4).flatten(2, 3)


def _differences(table: Tensor, size: int) -> Tensor:
    """Row y - y' of a table [2 size - 1, d], stretched to that size where it has another, [size, size, d]."""
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.mT[None], size=2 * size - 1, mode="linear")[0].mT
    at = torch.arange(size, device=table.device)
    return table[at[:, None] - at + size - 1]


def _swin(self: Any, x: Tensor, mask: Tensor | None = None) -> Made:
    q, k, v = packed(self, x, self.num_heads)
    bias = _by_table(self.relative_position_bias_table, self.relative_position_index)
    return Made(q, k, v, _windows(bias, mask, len(x)))


def _swin_v2(self: Any, x: Tensor, mask: Tensor | None = None) -> Made:
    q, k, v = packed(self, x, self.num_heads)
    table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
    bias = 16 * torch.sigmoid(_by_table(table, self.relative_position_index))
    q, k = cosines(q, k, self.logit_scale)
    return Made(q, k, v, _windows(bias, mask, len(x)))


def _swin_cr(self: Any, x: Tensor, mask: Tensor | None = None) -> Made:
    q, k, v = packed(self, x, self.num_heads)
    bias = self.meta_mlp(self.relative_coordinates_log).mT.reshape(1, -1, x.shape[1], x.shape[1])
    q, k = cosines(q, k, self.logit_scale)
    return Made(q, k, v, _windows(bias, mask, len(x)))


def _beit(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Made:
    bias = shared_rel_pos_bias
    if (table := getattr(self, _TABLE[0], None)) is not None:
        own = _by_table(table, self.relative_position_index)
        bias = own if bias is None else own + bias
    q, k, v = packed(self, x, self.num_heads)
    return Made(q, k, v, bias)


def _tiny_vit(self: Any, x: Tensor) -> Made:
    q, k, v = split(self.qkv(self.norm(x)), self.num_heads).chunk(3, -1)
    return Made(q, k, v, self.attention_biases[:, self.attention_bias_idxs][None])


def _max_vit(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Made:
    y = self.qkv(x).flatten(1, -2)
    q, k, v = (
        split(y, self.num_heads).chunk(3, -1) if self.head_first else [split(p, self.num_heads) for p in y.chunk(3, -1)]
    )
    bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
    return Made(q, k, v, bias)


def _sam(self: Any, x: Tensor) -> Made:
    q, k, v = packed(self, x.flatten(1, 2), self.num_heads)
    q, k = self.q_norm(q), self.k_norm(k)
    return Made(q, k, v, _by_axes(q, self.rel_pos_h, self.rel_pos_w, *x.shape[1:3]) if self.use_rel_pos else None)


def _sam_of_transformers(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> Made:
    x = hidden_states
    q, k, v = packed(self, x.flatten(1, 2), self.num_attention_heads)
    return Made(q, k, v, _by_axes(q, self.rel_pos_h, self.rel_pos_w, *x.shape[1:3]) if self.use_rel_pos else None)


def _projected(self: Any, x: Tensor, names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")) -> list[Tensor]:
    return [split(self.get_submodule(name)(x), self.num_attention_heads) for name in names]


def _swin_of_transformers(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Made:
    bias = self.relative_position_bias().contiguous()
    q, k, v = _projected(self, hidden_states)
    return Made(q, k, v, _windows(bias, attention_mask, len(hidden_states)))


def _beit_of_transformers(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Made:
    q, k, v = _projected(self, hidden_states)
    return Made(q, k, v, attention_mask)


def _swin_v2_of_transformers(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
) -> Made:
    if output_attentions:
        raise InputError("fused attention gives no softmax back; run vitlr.unfuse(model) with output_attentions")
    q, k, v = _projected(self, hidden_states, _SEPARATE)
    table = self.continuous_position_bias_mlp(self.relative_coords_table).view(-1, self.num_attention_heads)
    bias = 16 * torch.sigmoid(_by_table(table, self.relative_position_index))
    mask = None if attention_mask is None else 2 * attention_mask  # as the original, which adds it twice
    q, k = cosines(q, k, self.logit_scale)
    return Made(q, k, v, _windows(bias, mask, len(hidden_states)))


def _data2vec(
    self: Any,
    hidden_states: Tensor,
    output_attentions: bool = False,
    relative_position_bias: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: tuple[int, int] | None = None,
) -> Made:
    bias = relative_position_bias
    if self.has_relative_position_bias and resolution is not None:
        grid = tuple(n // self.config.patch_size for n in resolution)
        own = self.relative_position_bias(grid, interpolate_pos_encoding, dim_size=hidden_states.shape[1])
        bias = own if bias is None else own + bias
    q, k, v = _projected(self, hidden_states, _SEPARATE)
    return Made(q, k, v, bias)


def _segformer(
    self: Any, hidden_states: Tensor, height: int, width: int, attention_mask: Tensor | None = None, **_: Any
) -> Made:
    x = self.sequence_reduction(hidden_states, height, width) if self.sequence_reduction_ratio > 1 else hidden_states
    (q,), (k, v) = _projected(self, hidden_states, ("q_proj",)), _projected(self, x, ("k_proj", "v_proj"))
    if attention_mask is not None and not attention_mask.is_floating_point():
        attention_mask = attention_mask.to(q.dtype).log()  # of what may be seen, 0 and -inf
    return Made(q, k, v, attention_mask)


def _multi_scale(self: Any, x: Tensor, feat_size: list[int]) -> Made:
    (q, size), (k, reduced), (v, _) = (
        _pooled(self, part, kind, feat_size) for part, kind in zip(packed(self, x, self.num_heads), "qkv", strict=True)
    )
    if self.rel_pos_type != "spatial":
        return Made(q, k, v, size=size)
    first = int(self.has_cls_token)
    grid = q[:, :, first:].unflatten(2, size)
    R, C = (_strided(t, n, m) for t, n, m in zip((self.rel_pos_h, self.rel_pos_w), size, reduced, strict=True))
    down, right = torch.einsum("bnhwc,hkc->bnhwk", grid, R), torch.einsum("bnhwc,wkc->bnhwk", grid, C)
    bias = (down[..., :, None] + right[..., None, :]).flatten(4).flatten(2, 3)
    return Made(q, k, v, F.pad(bias, (first, 0, first, 0)), size)


def _pooled(self: Any, x: Tensor, kind: str, size: list[int]) -> tuple[Tensor, list[int]]:
    """Heads [B, H, N, d] with a grid of fewer tokens behind the class token, and that grid's size."""
    pool, norm = getattr(self, f"pool_{kind}", None), getattr(self, f"norm_{kind}", None)
    if pool is not None:
        first = int(self.has_cls_token)
        grid = pool(x[:, :, first:].flatten(0, 1).mT.unflatten(2, size).contiguous())
        size = list(grid.shape[2:])
        x = torch.cat([x[:, :, :first], grid.flatten(2).mT.unflatten(0, x.shape[:2])], 2)
    return x if norm is None else norm(x), size


def _strided(table: Tensor, queries: int, keys: int) -> Tensor:
    """Row of a table for every query and key of one axis, where one of them has several of the other's places."""
    step, stride = max(keys / queries, 1.0), max(queries / keys, 1.0)
    here = torch.arange(queries, device=table.device)[:, None] * step
    there = torch.arange(keys, device=table.device) * stride
    return table[(here - there + (keys - 1) * stride).long()]


_SEPARATE = ("query", "key", "value")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_OF, _HF = "timm.models", "transformers.models"
_PLAIN = ("qkv", "attn_drop", "proj", "proj_drop")
_TABLE = ("relative_position_bias_table", "relative_position_index")
_AXES = ("rel_pos_h", "rel_pos_w")
_HEADS = ("num_attention_heads",)
FORMS = {
    f"{_OF}.swin_transformer.WindowAttention": Form(_swin, (*_PLAIN, "softmax"), _TABLE),
    f"{_OF}.swin_transformer_v2.WindowAttention": Form(
        _swin_v2,
        (*_PLAIN, "softmax", "cpb_mlp"),
        ("logit_scale", "relative_coords_table", "relative_position_index", *BIASES),
        ("num_heads", "qkv_bias_separate"),
    ),
    f"{_OF}.swin_transformer_v2_cr.WindowMultiHeadAttention": Form(
        _swin_cr, (*_PLAIN, "meta_mlp"), ("logit_scale", "relative_coordinates_log")
    ),
    f"{_OF}.beit.Attention": Form(_beit, _PLAIN, (*_TABLE, *BIASES), ("num_heads", "qkv_bias_separate")),
    f"{_OF}.tiny_vit.Attention": Form(_tiny_vit, ("norm", "qkv", "proj"), ("attention_biases", "attention_bias_idxs")),
    f"{_OF}.maxxvit.AttentionCl": Form(_max_vit, _PLAIN, kept=("num_heads", "head_first"), optional=("rel_pos",)),
    f"{_OF}.vision_transformer_sam.Attention": Form(
        _sam, (*_PLAIN, "q_norm", "k_norm"), _AXES, ("num_heads", "use_rel_pos")
    ),
    f"{_HF}.sam.modeling_sam.SamVisionSdpaAttention": Form(
        _sam_of_transformers, ("qkv", "proj"), _AXES, (*_HEADS, "use_rel_pos"), finish=_pair
    ),
    f"{_HF}.swin.modeling_swin.SwinAttention": Form(
        _swin_of_transformers, (*_PROJECTIONS, "relative_position_bias"), kept=_HEADS, finish=_pair
    ),
    f"{_HF}.swinv2.modeling_swinv2.Swinv2SelfAttention": Form(
        _swin_v2_of_transformers,
        (*_SEPARATE, "dropout", "continuous_position_bias_mlp"),
        ("logit_scale", "relative_coords_table", "relative_position_index"),
        _HEADS,
        finish=_bare,
    ),
    f"{_HF}.data2vec.modeling_data2vec_vision.Data2VecVisionSdpaSelfAttention": Form(
        _data2vec,
        (*_SEPARATE, "dropout"),
        kept=(*_HEADS, "config", "has_relative_position_bias"),
        optional=("relative_position_bias",),
        finish=_bare_pair,
    ),
    f"{_HF}.segformer.modeling_segformer.SegformerAttention": Form(
        _segformer,
        _PROJECTIONS,
        kept=(*_HEADS, "sequence_reduction_ratio"),
        optional=("sequence_reduction",),
        finish=_pair,
    ),
    f"{_OF}.mvitv2.MultiScaleAttention": Form(
        _multi_scale,
        ("qkv", "proj"),
        _AXES,
        ("num_heads", "has_cls_token", "rel_pos_type", "residual_pooling"),
        tuple(f"{part}_{kind}" for part in ("pool", "norm") for kind in "qkv"),
        _multi_scale_out,
    ),
    f"{_HF}.beit.modeling_beit.BeitAttention": Form(_beit_of_transformers, _PROJECTIONS, kept=_HEADS, finish=_pair),
}
