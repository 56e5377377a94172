"""Self-attention of timm whose queries and keys are rotated, with everything after that as one operation."""

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
CLASSES = ("timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention")
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_BIASES = ("q_bias", "k_bias", "v_bias")


class FusedRotaryAttention(Fused):
    """`y = proj(softmax(R q (R k)ᵀ / √d) v)`, R the rotation by a token's place: timm's EVA, DINOv3 and rotary ViTs.

    The children, and biases beside `qkv`, keep their names, so state_dict keys do not change. The op `attention` runs
    without mask and dropout where dispatch chooses a kernel, otherwise `F.scaled_dot_product_attention`, as in the
    original. Raises InputError with the reason of `why_not`.
    """

    KEPT = ("q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")

    if TYPE_CHECKING:
        q_norm: nn.Module
        k_norm: nn.Module
        norm: nn.Module
        proj: nn.Module
        proj_drop: nn.Module

    def __init__(self, attention: nn.Module) -> None:
        super().__init__(attention)
        self._parameters.update(attention._parameters)
        self._buffers.update(attention._buffers)
        self._non_persistent_buffers_set.update(attention._non_persistent_buffers_set)
        self.num_heads: int = attention.num_heads  # type: ignore[assignment]
        self.head_dim: int = attention.head_dim  # type: ignore[assignment]
        self.num_prefix_tokens: int = attention.num_prefix_tokens  # type: ignore[assignment]
        self.rotate_half = bool(getattr(attention, "rotate_half", False))
        self.qkv_bias_separate = getattr(attention, "qkv_bias_separate", None)

    @classmethod
    def children_of(cls, module: nn.Module) -> tuple[str, ...]:
        inputs = ("qkv",) if isinstance(getattr(module, "qkv", None), nn.Module) else _SEPARATE
        return (*inputs, *(name for name in cls.KEPT if isinstance(getattr(module, name, None), nn.Module)))

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module cannot become a FusedRotaryAttention with the same outputs; None if it can."""
        if isinstance(module, cls):
            return "it is one already"
        if class_of(module) not in CLASSES:
            return f"it is none of {', '.join(CLASSES)}"
        if getattr(module, "fused_attn", False) is not True:
            return "it multiplies matrices itself (fused_attn is off)"
        if getattr(module, "gate", None) is not None or getattr(module, "num_kv_groups", 1) != 1:
            return "it has a gate, or heads that share keys and values"
        kept = cls.children_of(module)
        missing = [name for name in (*kept, *cls.KEPT) if not isinstance(getattr(module, name, None), nn.Module)]
        extra = [name for name, _ in module.named_children() if name not in kept]
        if missing or extra:
            return f"it has {', '.join(extra) or 'nothing'} besides, and no {', '.join(missing) or 'part missing'}"
        if beside := [*(module._parameters.keys() | module._buffers.keys()) - set(_BIASES)]:
            return f"it has {', '.join(sorted(beside))} besides"
        if (foreign := foreign_weight(module)) is not None:
            return f"it holds a {foreign}, no plain weight"
        if not does_nothing(module.get_submodule("attn_drop")):
            return "it drops out attention"
        return "it has hooks" if has_hooks(module) else None

    def back(self) -> nn.Module:
        """The original module with the children and biases as they are now."""
        module = super().back()
        module._parameters.update(self._parameters)
        module._buffers.update(self._buffers)
        return module

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        q, k, v = self._heads(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._rotated(heads, rope).to(v.dtype) for heads in (q, k))
        return self.proj_drop(self.proj(self.norm(self._attend(q, k, v, attn_mask, is_causal))))

    def _heads(self, x: Tensor) -> list[Tensor]:
        """q, k and v, [B, heads, tokens, head_dim]."""
        if "qkv" not in self._modules:
            made = [self.get_submodule(name)(x) for name in _SEPARATE]
        else:
            made = list(self._qkv(x).chunk(3, -1))
        return [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in made]

    def _qkv(self, x: Tensor) -> Tensor:
        qkv = self.get_submodule("qkv")
        q_bias, k_bias, v_bias = (getattr(self, name, None) for name in _BIASES)
        if q_bias is None or k_bias is None or v_bias is None:
            y: Tensor = qkv(x)
            return y
        bias = torch.cat((q_bias, k_bias, v_bias))
        if self.qkv_bias_separate:
            return qkv(x) + bias
        return F.linear(x, qkv.weight, bias)  # type: ignore[arg-type]

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        """All tokens but the first ones turned by their places; rope [..., tokens, 2 head_dim]: sines, then cosines."""
        first, x = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        sin, cos = rope.chunk(2, -1)
        if self.rotate_half:
            a, b = x.chunk(2, -1)
            turned = torch.cat([-b, a], -1)
        else:
            pairs = x.unflatten(-1, (-1, 2))
            turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
        return torch.cat([first, (x * cos + turned * sin).to(x.dtype)], 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        plain = attn_mask is None and not is_causal and not is_transformed() and foreign_weight(self) is None
        if plain and has_kernels(op.OP):
            keys = None if torch.compiler.is_compiling() else k.shape[2]
            if kernel_chosen(op.OP, q, keys, self.head_dim):
                return op.attention(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask, 0.0, is_causal).transpose(1, 2).flatten(2)
