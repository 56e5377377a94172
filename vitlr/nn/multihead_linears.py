"""`nn.MultiheadAttention` whose weights are linears, which can be measured and replaced."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlr.errors import InputError
from vitlr.nn._attend import attend
from vitlr.nn._plain import has_hooks


class MultiheadLinears(nn.Module):
    """`out_proj(concat_h softmax(q_h k_hᵀ / √d + mask) v_h)` with q, k, v of one linear `qkv`, called as torch's is.

    query [B, T, E], key and value [B, S, E] (`[T, B, E]` unless `batch_first`; without B for one sequence) -> output as
    query, and the softmax [B, T, S], its mean over heads, or None unless `need_weights`. The same function as the
    `nn.MultiheadAttention` it is made of, but for rounding; its parameters are that one's own, `qkv.weight` [3 E, E].
    Raises `InputError` for `is_causal=True` without the mask, as torch does.
    """

    # Parents ask for these: without them torch's own encoder layer calls its parts instead of reading their weights.
    in_proj_weight = in_proj_bias = None
    inside = ("qkv", "out_proj")

    def __init__(self, qkv: nn.Module, out_proj: nn.Module, num_heads: int, dropout: float, batch_first: bool) -> None:
        super().__init__()
        self.qkv, self.out_proj = qkv, out_proj
        self.num_heads, self.dropout, self.batch_first = num_heads, dropout, batch_first
        self._dense: tuple[nn.MultiheadAttention, ...] = ()  # a tuple, so that it is no submodule

    @property
    def embed_dim(self) -> int:
        """E."""
        return int(self.out_proj.out_features)  # type: ignore[arg-type]

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """Why this is not the same for a module, or None."""
        if type(module) is not nn.MultiheadAttention:
            return f"{type(module).__qualname__} is not exactly nn.MultiheadAttention"
        if module.in_proj_weight is None:
            return "keys or values have a width of their own"
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds a key and a value of its own"
        if type(module.in_proj_weight) is not nn.Parameter or not module.in_proj_weight.is_floating_point():
            return "its in_proj_weight is no plain floating-point parameter"
        if type(module.out_proj.weight) is not nn.Parameter:
            return "its out_proj.weight is no plain parameter"
        if has_hooks(module) or has_hooks(module.out_proj):
            return "it has hooks, which would vanish with it"
        return None

    @classmethod
    def from_dense(cls, dense: nn.MultiheadAttention) -> MultiheadLinears:
        """The same attention on the same parameters. Raises `InputError` where `why_not` says so."""
        if (reason := cls.why_not(dense)) is not None:
            raise InputError(f"no linears can be made of this attention: {reason}")
        qkv = _linear(dense.in_proj_weight, dense.in_proj_bias)
        out_proj = _linear(dense.out_proj.weight, dense.out_proj.bias)
        made = cls(qkv, out_proj, dense.num_heads, dense.dropout, dense.batch_first)
        made._dense = (dense,)
        return made.train(dense.training)

    @property
    def plain(self) -> bool:
        """Whether its linears are ordinary ones, so that `to_dense` needs nothing but their parameters."""
        return type(self.qkv) is nn.Linear and type(self.out_proj) is nn.Linear

    def to_dense(self) -> nn.MultiheadAttention:
        """Torch's own module on the parameters of `qkv` and `out_proj`: the one it was made of, if it has them yet."""
        qkv, out = self.qkv, self.out_proj
        assert isinstance(qkv, nn.Linear) and isinstance(out, nn.Linear)
        for dense in self._dense:
            held = (dense.in_proj_weight, dense.in_proj_bias, dense.out_proj.weight, dense.out_proj.bias)
            if all(a is b for a, b in zip(held, (qkv.weight, qkv.bias, out.weight, out.bias), strict=True)):
                return dense.train(self.training)
        how = {"bias": qkv.bias is not None, "batch_first": self.batch_first, "device": "meta"}
        dense = nn.MultiheadAttention(self.embed_dim, self.num_heads, self.dropout, **how)
        dense.in_proj_weight, dense.in_proj_bias = qkv.weight, qkv.bias  # type: ignore[assignment]
        dense.out_proj.weight, dense.out_proj.bias = out.weight, out.bias
        return dense.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise InputError("is_causal=True says what attn_mask is; give it as well")
        alone = query.dim() == 2
        q, k, v = (self._heads(x) for x in self._projected(query, key, value, alone))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            read = (weights @ v).transpose(1, 2).flatten(2)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if alone else weights
        else:
            read = attend(self, q, k, v, mask=mask, dropout=dropout)
        answer = self.out_proj(read)
        return self._back(answer, alone), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, alone: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, tokens, E]: one call where all three are the same, as they are in every ViT."""
        if query is key and key is value:
            q, k, v = self.qkv(self._front(query, alone)).chunk(3, -1)
            return q, k, v
        q = self.qkv(self._front(query, alone)).chunk(3, -1)[0]
        _, k, v = self.qkv(self._front(key, alone)).chunk(3, -1)
        if value is not key:
            v = self.qkv(self._front(value, alone)).chunk(3, -1)[2]
        return q, k, v

    def _front(self, x: Tensor, alone: bool) -> Tensor:
        """With images in front: rows of one lie together."""
        return x.unsqueeze(0) if alone else x if self.batch_first else x.transpose(0, 1)

    def _back(self, x: Tensor, alone: bool) -> Tensor:
        return x.squeeze(0) if alone else x if self.batch_first else x.transpose(0, 1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
        """What is added to scores [B, heads, T, S]: −∞ where a mask of bools is True."""
        total: Tensor | None = None
        if attn_mask is not None:
            total = _added(attn_mask, q)
            total = total.unflatten(0, (-1, self.num_heads)) if total.dim() == 3 else total
        if padding is not None:
            over_keys = _added(padding, q).reshape(-1, 1, 1, k.shape[2])
            total = over_keys if total is None else total + over_keys
        return total

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _linear(weight: Any, bias: Any) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(mask, -torch.inf)
