"""How attentions with a bias of positions make q, k, v and that bias from their input, class by class.

Every function gives `q, k, v [B, H, N, d]` and a bias that broadcasts to [B, H, N, N], or none, such that scores are
`q kᵀ / √d + bias`; `self` holds the children, parameters and buffers of the class under their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlr.nn._attend import BIASES, packed, split

Made = tuple[Tensor, Tensor, Tensor, Tensor | None]
_LARGEST = math.log(100.0)  # of logit_scale, the logarithm of what cosines are multiplied by


class Form(NamedTuple):
    """One class: `make(self, x, ...)`, what it must have, what it may have, and how it answers."""

    make: Callable[..., Made]
    children: tuple[str, ...]
    own: tuple[str, ...] = ()  # parameters and buffers
    kept: tuple[str, ...] = ("num_heads",)  # plain attributes
    optional: tuple[str, ...] = ()  # children
    pair: bool = False  # whether it returns (y, None)


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
    return q, k, v, _windows(bias, mask, len(x))


def _swin_v2(self: Any, x: Tensor, mask: Tensor | None = None) -> Made:
    q, k, v = packed(self, x, self.num_heads)
    table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
    bias = 16 * torch.sigmoid(_by_table(table, self.relative_position_index))
    return *cosines(q, k, self.logit_scale), v, _windows(bias, mask, len(x))


def _swin_cr(self: Any, x: Tensor, mask: Tensor | None = None) -> Made:
    q, k, v = packed(self, x, self.num_heads)
    bias = self.meta_mlp(self.relative_coordinates_log).mT.reshape(1, -1, x.shape[1], x.shape[1])
    return *cosines(q, k, self.logit_scale), v, _windows(bias, mask, len(x))


def _beit(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Made:
    bias = shared_rel_pos_bias
    if (table := getattr(self, _TABLE[0], None)) is not None:
        own = _by_table(table, self.relative_position_index)
        bias = own if bias is None else own + bias
    return *packed(self, x, self.num_heads), bias  # type: ignore[return-value]


def _tiny_vit(self: Any, x: Tensor) -> Made:
    q, k, v = split(self.qkv(self.norm(x)), self.num_heads).chunk(3, -1)
    return q, k, v, self.attention_biases[:, self.attention_bias_idxs][None]


def _max_vit(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Made:
    y = self.qkv(x).flatten(1, -2)
    parts = (
        split(y, self.num_heads).chunk(3, -1) if self.head_first else [split(p, self.num_heads) for p in y.chunk(3, -1)]
    )
    bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
    return *parts, bias


def _sam(self: Any, x: Tensor) -> Made:
    q, k, v = packed(self, x.flatten(1, 2), self.num_heads)
    q, k = self.q_norm(q), self.k_norm(k)
    return q, k, v, _by_axes(q, self.rel_pos_h, self.rel_pos_w, *x.shape[1:3]) if self.use_rel_pos else None


def _sam_of_transformers(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> Made:
    x = hidden_states
    q, k, v = packed(self, x.flatten(1, 2), self.num_attention_heads)
    return q, k, v, _by_axes(q, self.rel_pos_h, self.rel_pos_w, *x.shape[1:3]) if self.use_rel_pos else None


def _projected(self: Any, x: Tensor) -> list[Tensor]:
    return [split(self.get_submodule(name)(x), self.num_attention_heads) for name in _PROJECTIONS[:3]]


def _swin_of_transformers(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Made:
    bias = self.relative_position_bias().contiguous()
    return *_projected(self, hidden_states), _windows(bias, attention_mask, len(hidden_states))  # type: ignore[return-value]


def _beit_of_transformers(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Made:
    return *_projected(self, hidden_states), attention_mask  # type: ignore[return-value]


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
        _sam_of_transformers, ("qkv", "proj"), _AXES, (*_HEADS, "use_rel_pos"), pair=True
    ),
    f"{_HF}.swin.modeling_swin.SwinAttention": Form(
        _swin_of_transformers, (*_PROJECTIONS, "relative_position_bias"), kept=_HEADS, pair=True
    ),
    f"{_HF}.beit.modeling_beit.BeitAttention": Form(_beit_of_transformers, _PROJECTIONS, kept=_HEADS, pair=True),
}
