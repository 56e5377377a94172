"""Self-attention under a bias of positions, with everything between its linears as one operation."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitlr.nn._attend import attend
from vitlr.nn._fused import Fused
from vitlr.nn._plain import does_nothing, foreign_weight, has_hooks
from vitlr.nn.position_biases import FORMS
from vitlr.runtime.modules import class_of


class FusedBiasedAttention(Fused):
    """`y = proj(softmax(q kᵀ / √d + P) v)`, P by where tokens lie to each other: Swin, BEiT, SAM, TinyViT, MaxViT,
    MViTv2, Data2Vec; SegFormer has none, and keys of fewer tokens.

    The classes are those of `FORMS`. Children, parameters and buffers keep their names, so state_dict keys do not
    change. The op `attention` takes P where dispatch chooses a kernel, otherwise `F.scaled_dot_product_attention` does:
    the same but for rounding, also where the original multiplies matrices itself. Raises InputError with the reason of
    `why_not`.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__(attention)
        self.form: str = class_of(attention)
        self._parameters.update(attention._parameters)
        self._buffers.update(attention._buffers)
        self._non_persistent_buffers_set.update(attention._non_persistent_buffers_set)
        for name in (*FORMS[self.form].kept, *FORMS[self.form].optional):
            if name not in self._modules:
                setattr(self, name, getattr(attention, name, None))

    @classmethod
    def children_of(cls, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name, child in module._modules.items() if child is not None)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module cannot become a FusedBiasedAttention with the same outputs; None if it can."""
        if isinstance(module, cls):
            return "it is one already"
        form = FORMS.get(class_of(module))
        if form is None:
            return "it is no attention with a bias of positions that is known"
        children = cls.children_of(module)
        missing = [name for name in (*form.children, *form.kept) if not hasattr(module, name)]
        extra = {*children, *module._parameters, *module._buffers} - {*form.children, *form.optional, *form.own}
        if missing or extra:
            return (
                f"it has {', '.join(sorted(extra)) or 'nothing'} besides, and no {', '.join(missing) or 'part missing'}"
            )
        if getattr(getattr(module, "config", None), "_attn_implementation", "sdpa") != "sdpa":
            return f"it runs as {module.config._attn_implementation}, which may give its softmax back"  # type: ignore[union-attr]
        if getattr(module, "attn_ratio", 1) != 1:
            return "its values are wider than its queries and keys"
        if (foreign := foreign_weight(module)) is not None:
            return f"it holds a {foreign}, no plain weight"
        drops = [getattr(module, name, None) or nn.Identity() for name in ("attn_drop", "dropout")]
        if not all(map(does_nothing, drops)) or getattr(module, "attention_dropout", False):
            return "it drops out attention"
        return "it has hooks" if has_hooks(module) else None

    def back(self) -> nn.Module:
        """The original module with the children, parameters and buffers as they are now."""
        module = super().back()
        module._parameters.update(self._parameters)
        module._buffers.update(self._buffers)
        if hasattr(module, "attention_bias_cache"):
            module.attention_bias_cache = {}  # type: ignore[assignment]  # made of weights before these
        return module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        form, x = FORMS[self.form], (*args, *kwargs.values())[0]
        made = form.make(self, *args, **kwargs)
        bias = None if made.bias is None else made.bias.to(made.q.dtype)
        return form.finish(self, x, attend(self, made.q, made.k, made.v, bias), made)
