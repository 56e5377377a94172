"""A transformer MLP, and a block, whose linears multiply 8-bit floats."""

from __future__ import annotations

from torch import Tensor

from vitlr.nn.fp8_linear import Fp8Linear
from vitlr.nn.int8_block import Int8Block, Parts
from vitlr.nn.int8_mlp import Int8MLP
from vitlr.nn.lowrank_linear import LowRankLinear
from vitlr.ops.layers.attention import attention
from vitlr.ops.layers.fp8_chain import fp8_chain


class Fp8MLP(Int8MLP):
    """`y = fc2(act(fc1(x)))` with both linears an `Fp8Linear`, or a `LowRankLinear` of two, as one chain of bytes."""

    KIND = Fp8Linear
    TAKES = (Fp8Linear, LowRankLinear)


class Fp8Block(Int8Block):
    """timm's `Block` as three operations: norm and qkv, attention in x's dtype, proj and residual sum; then the MLP.

    Its attention is a `FusedAttention` and its MLP an `Fp8MLP`. All else is as in `Int8Block`.
    """

    MLP = Fp8MLP

    def _steps(self, x: Tensor, parts: Parts, query_keys: tuple[int, ...]) -> None:
        """These operations have no short way."""

    def _halves(self, x: Tensor, parts: Parts, query_keys: tuple[int, ...]) -> Tensor:
        norm1, qkv, _, proj, norm2, fc1, act, fc2 = parts
        none = ["none"] * 2
        y = fp8_chain(x, qkv, none[: len(qkv)], norm=norm1)
        q, k, v = y.unflatten(-1, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = fp8_chain(attention(q, k, v), proj, none[: len(proj)], x)
        return fp8_chain(x, [*fc1, *fc2], [*none[: len(fc1) - 1], act, *none[: len(fc2)]], x, norm2)
