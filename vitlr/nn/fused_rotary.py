"""Self-attention of timm whose queries and keys are rotated, with everything after that as one operation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitlr.nn._attend import BIASES, attend, packed, split
from vitlr.nn._fused import Fused
from vitlr.nn._plain import does_nothing, foreign_weight, has_hooks
from vitlr.runtime.modules import class_of

# Classes whose forward is known, by name: this package does not import timm.
CLASSES = ("timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention")
_SEPARATE = ("q_proj", "k_proj", "v_proj")


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
        if beside := [*(module._parameters.keys() | module._buffers.keys()) - set(BIASES)]:
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
        return self.proj_drop(self.proj(self.norm(attend(self, q, k, v, mask=attn_mask, causal=is_causal))))

    def _heads(self, x: Tensor) -> list[Tensor]:
        """q, k and v, [B, heads, tokens, head_dim]."""
        if "qkv" in self._modules:
            return packed(self, x, self.num_heads)
        return [split(self.get_submodule(name)(x), self.num_heads) for name in _SEPARATE]

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
