"""Self-attention of transformers' blocks, with everything between its four linears as one operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitlr.nn._attend import attend
from vitlr.nn._fused import Fused
from vitlr.nn._plain import foreign_weight, has_hooks
from vitlr.runtime.modules import class_of

_OF = "transformers.models"
# Classes whose forward is known, by name: heads of q_proj, k_proj and v_proj, softmax(q kᵀ / √d) v, then `out`.
CLASSES = frozenset(
    f"{_OF}.{family}.modeling_{family}.{name}Attention"
    for family, name in {
        "aimv2": "Aimv2",
        "altclip": "AltCLIP",
        "chinese_clip": "ChineseCLIPVision",
        "clip": "CLIP",
        "clipseg": "CLIPSeg",
        "deit": "DeiT",
        "dinov2": "Dinov2",
        "dinov2_with_registers": "Dinov2WithRegisters",
        "eomt": "Eomt",
        "idefics2": "Idefics2Vision",
        "idefics3": "Idefics3Vision",
        "ijepa": "IJepa",
        "metaclip_2": "MetaClip2",
        "owlv2": "Owlv2",
        "owlvit": "OwlViT",
        "pixio": "Pixio",
        "rf_detr": "RfDetrDinov2",
        "siglip": "Siglip",
        "siglip2": "Siglip2",
        "smolvlm": "SmolVLMVision",
        "vit": "ViT",
        "vit_mae": "ViTMAE",
        "vit_msn": "ViTMSN",
        "vivit": "Vivit",
        "x_clip": "XCLIP",
    }.items()
)
# The same without `out`, which lies in a module beside it.
BARE = frozenset(
    f"{_OF}.{family}.modeling_{family}.{name}SelfAttention"
    for family, name in {
        "dpt": "DPT",
        "videomae": "VideoMAE",
        "vitpose_backbone": "VitPoseBackbone",
        "yolos": "Yolos",
    }.items()
)
# The same with queries and keys turned by their places, by the cosines and sines that the model hands on.
TURNED = frozenset({f"{_OF}.dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention"})
_INPUTS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_DROPOUT = ("attention_dropout", "dropout_prob", "dropout")
_OUT = ("o_proj", "out_proj")


class FusedProjections(Fused):
    """`y = out(softmax(q kᵀ / √d) v)`, q, k, v from linears of their own: transformers' attention as it is in a ViT.

    DINOv3 turns q and k by their places before that; YOLOS, VideoMAE and DPT have `out` in a module beside it.

    The children keep their names, so state_dict keys do not change. The op `attention` runs without mask where dispatch
    chooses a kernel, otherwise `F.scaled_dot_product_attention`, as in the original, which gives no softmax back
    either. Raises InputError with the reason of `why_not`.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__(attention)
        self.head_dim: int = getattr(attention, "head_dim", None) or attention.attention_head_size  # type: ignore[assignment]
        self.is_causal: bool = attention.is_causal  # type: ignore[assignment]

    @classmethod
    def children_of(cls, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in module._modules if name in {*_INPUTS[0], *_INPUTS[1], *_OUT})

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module cannot become a FusedProjections with the same outputs; None if it can."""
        if isinstance(module, cls):
            return "it is one already"
        if class_of(module) not in CLASSES | BARE | TURNED:
            return "it is no attention of transformers' that is known"
        kept = cls.children_of(module)
        extra = [name for name, _ in module.named_children() if name not in kept]
        if len(kept) != (3 if class_of(module) in BARE else 4) or extra or module._parameters or module._buffers:
            there = ", ".join([*kept, *extra, *module._parameters, *module._buffers])
            return f"it has {there}, expected query, key and value, or projections of these and of the output"
        how = getattr(module.config, "_attn_implementation", None)
        if how != "sdpa":
            return f"it runs as {how}, which may give its softmax back"
        dropout = next((getattr(module, key) for key in _DROPOUT if hasattr(module, key)), 0.0)
        if dropout:
            return "it drops out attention"
        if (foreign := foreign_weight(module)) is not None:
            return f"it holds a {foreign}, no plain weight"
        return "it has hooks" if has_hooks(module) else None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (self._heads(self.get_submodule(name)(hidden_states)) for name in self._inputs())
        if (places := kwargs.get("position_embeddings")) is not None:
            q, k = _turned(q, *places), _turned(k, *places)
        asked = kwargs.get("is_causal")
        causal = bool(self.is_causal if asked is None else asked) and attention_mask is None and q.shape[2] > 1
        y = attend(self, q, k, v, mask=attention_mask, causal=causal)
        out = next((name for name in self.kept if name in _OUT), None)
        return y if out is None else self.get_submodule(out)(y), None

    def _inputs(self) -> tuple[str, ...]:
        return next(names for names in _INPUTS if names[0] in self.kept)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [B, H, N, d] whose last tokens, as many as there are places, turn in planes of channels j, j + d/2."""
    first, x = x.split((x.shape[2] - sin.shape[-2], sin.shape[-2]), 2)
    a, b = x.chunk(2, -1)
    return torch.cat([first, x * cos + torch.cat([-b, a], -1) * sin], 2)
