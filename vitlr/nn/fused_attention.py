"""Self-attention of a timm block, with everything between its two linears as one operation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlr.nn._fused import Fused
from vitlr.nn._plain import does_nothing, foreign_weight, has_hooks, is_transformed
from vitlr.ops.dispatch.registration import kernel_chosen
from vitlr.ops.dispatch.registry import has_kernels
from vitlr.ops.layers import attention as op
from vitlr.runtime.modules import class_of

# Classes whose forward is known, by name: this package does not import timm.
CLASSES = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")


class FusedAttention(Fused):
    """`y = proj(softmax(q kᵀ / √d) v)`, q, k, v from `qkv(x)`: timm's `Attention` with the op `attention` inside.

    The children keep their names, so state_dict keys do not change, and are shared with `attention`; `back`
    gives the original module back. The op runs without mask and dropout where dispatch chooses a kernel, otherwise
    `F.scaled_dot_product_attention`, as in the original. Raises InputError with the reason of `why_not`.
    """

    KEPT = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")

    if TYPE_CHECKING:
        qkv: nn.Module
        q_norm: nn.Module
        k_norm: nn.Module
        norm: nn.Module
        proj: nn.Module
        proj_drop: nn.Module

    def __init__(self, attention: nn.Module) -> None:
        super().__init__(attention)
        self.num_heads: int = attention.num_heads  # type: ignore[assignment]
        self.head_dim: int = attention.head_dim  # type: ignore[assignment]

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module cannot become a FusedAttention with the same outputs; None if it can."""
        if isinstance(module, cls):
            return "it is one already"
        if class_of(module) not in CLASSES:
            return f"it is no {CLASSES[0]}"
        if getattr(module, "fused_attn", False) is not True:
            return "it multiplies matrices itself (fused_attn is off)"
        missing = [name for name in (*cls.KEPT, "num_heads", "head_dim") if not hasattr(module, name)]
        if missing:
            return f"it has no {', '.join(missing)}"
        extra = [name for name, _ in module.named_children() if name not in cls.KEPT]
        if extra or module._parameters or module._buffers:
            return f"it has {', '.join([*extra, *module._parameters, *module._buffers])} besides"
        if (foreign := foreign_weight(module)) is not None:
            return f"it holds a {foreign}, no plain weight"
        if not does_nothing(module.get_submodule("attn_drop")):
            return "it drops out attention"
        return "it has hooks" if has_hooks(module) else None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        B, L, _ = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if torch.jit.is_scripting():
            y = self._plain(q, k, v, attn_mask, is_causal)
        else:
            y = self._dispatched(q, k, v, attn_mask, is_causal)
        return self.proj_drop(self.proj(self.norm(y)))

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, 0.0, is_causal).transpose(1, 2).flatten(2)

    @torch.jit.unused
    def _dispatched(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        plain = attn_mask is None and not is_causal and not is_transformed() and foreign_weight(self) is None
        if plain and has_kernels(op.OP):
            keys = None if torch.compiler.is_compiling() else k.shape[2]
            if kernel_chosen(op.OP, q, keys, self.head_dim):
                return op.attention(q, k, v)
        return self._plain(q, k, v, attn_mask, is_causal)
