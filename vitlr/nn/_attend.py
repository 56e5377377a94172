"""What fused attentions share: heads of what linears made, and the product of these by a kernel where there is one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlr.nn._plain import foreign_weight, is_transformed
from vitlr.ops.dispatch.registration import kernel_chosen
from vitlr.ops.dispatch.registry import has_kernels
from vitlr.ops.layers import attention as op

BIASES = ("q_bias", "k_bias", "v_bias")


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """`softmax(q kᵀ / √d + bias) v`, [B, L, H d]: the op where dispatch chooses a kernel, else torch's own.

    A `mask` of the caller's, causality and dropout are left to torch. `module`: whose attention this is.
    """
    plain = mask is None and not causal and not dropout and not is_transformed() and foreign_weight(module) is None
    if plain and has_kernels(op.OP):
        keys = None if torch.compiler.is_compiling() else k.shape[2]
        if kernel_chosen(op.OP, q, keys, q.shape[3]):
            return op.attention(q, k, v, bias)
    mask = bias if mask is None else mask
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal).transpose(1, 2).flatten(2)


def split(x: Tensor, heads: int) -> Tensor:
    """[B, tokens, heads d] as [B, heads, tokens, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def packed(module: nn.Module, x: Tensor, heads: int) -> list[Tensor]:
    """q, k and v of one linear `qkv`, whose biases may lie beside it, [B, heads, tokens, d] each."""
    qkv = module.get_submodule("qkv")
    biases = [getattr(module, name, None) for name in BIASES]
    if any(bias is None for bias in biases):
        y = qkv(x)
    elif getattr(module, "qkv_bias_separate", False):
        y = qkv(x) + torch.cat(biases)  # type: ignore[arg-type]
    else:
        y = F.linear(x, qkv.weight, torch.cat(biases))  # type: ignore[arg-type]
    return [split(part, heads) for part in y.chunk(3, -1)]
