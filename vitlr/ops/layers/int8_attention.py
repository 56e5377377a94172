"""Attention between linears of integers: `y = proj(softmax(q kᵀ / √d) v) + residual`, `(q, k, v) = qkv(norm(x))`.

qkv and proj are steps of `int8_chain`, one each, or two of a low rank; the 3 H d outputs of qkv are those of q, k and
v in turn, head by head, as timm has them. Where heads have lost channels of q and k, qkv has none of them, and scores
are sums over what is left. One call does what stands in a block of a transformer before its MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlr.errors import InputError
from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.registration import Ready, register_running_op
from vitlr.ops.layers import attention, int8_chain
from vitlr.ops.layers.factors import Maybe, check_added
from vitlr.ops.layers.int8_chain import Norm, Step

OP = "int8_attention"
_PARTS = len(Step._fields)


def steps(flat: Sequence[Maybe]) -> list[Step]:
    """The steps whose parts the op takes one after the other."""
    return [Step(*flat[i : i + _PARTS]) for i in range(0, len(flat), _PARTS)]  # type: ignore[arg-type]


def reference(
    x: Tensor, norm: Sequence[Tensor], qkv: Sequence[Maybe], proj: Sequence[Maybe], residual: Maybe, heads: int,
    query_keys: Sequence[int], eps: float,
) -> Tensor:  # fmt: skip
    """The specification, in plain torch; what lies between the steps is in x's dtype."""
    q, k, v = split(_through(x, steps(qkv), None, norm, eps), heads, query_keys)
    return _through(attention.reference(q, k, v), steps(proj), residual)


def split(y: Tensor, heads: int, query_keys: Sequence[int]) -> list[Tensor]:
    """q, k, v [B, H, L, d] of what qkv put out, with zeros for the channels that heads lost."""
    if not query_keys:
        return list(y.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4))
    narrow = sum(query_keys)
    *queries_and_keys, v = y.split([narrow, narrow, y.shape[-1] - 2 * narrow], -1)
    v = v.unflatten(-1, (heads, -1)).transpose(1, 2)
    padded = (
        torch.stack([F.pad(one, (0, v.shape[-1] - one.shape[-1])) for one in part.split(list(query_keys), -1)], 1)
        for part in queries_and_keys
    )
    return [*padded, v]


def _through(x: Tensor, chain: list[Step], residual: Maybe, norm: Sequence[Tensor] = (), eps: float = 0.0) -> Tensor:
    columns: Any = [list(column) for column in zip(*chain, strict=True)]
    return int8_chain.reference(x, *columns, residual, ["none"] * len(chain), norm, eps)  # type: ignore[call-arg]


def int8_attention(
    x: Tensor,
    qkv: Sequence[Step],
    proj: Sequence[Step],
    heads: int,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    query_keys: Sequence[int] = (),
) -> Tensor:
    """`proj(softmax(q kᵀ / √d) v) + residual`, q, k, v [B, H, L, d] from `qkv(norm(x))`: x [B, L, K] -> y [B, L, N].

    `query_keys` [H]: how many of the d channels the queries, and the keys, of each head have; all where it is empty.
    y has x's dtype. There is no gradient: asking for one raises InputError, as do shapes, dtypes or devices that do not
    fit and outputs of qkv that are not three for each of so many heads.
    """
    return _call(x, *_rest(qkv, proj, heads, residual, norm, query_keys))


def ready(x: Tensor, *rest: Any) -> Ready | None:
    """Calls of `int8_attention` with these arguments, for x and residuals like these, if there is a short way."""
    return _call.ready(x, *_rest(*rest))


def _rest(
    qkv: Sequence[Step], proj: Sequence[Step], heads: int, residual: Tensor | None = None, norm: Norm | None = None,
    query_keys: Sequence[int] = (),
) -> tuple:  # fmt: skip
    gamma_beta, eps = ([], 0.0) if norm is None else ([norm.gamma, norm.beta], norm.eps)
    sides = ([part for step in side for part in step] for side in (qkv, proj))
    return gamma_beta, *sides, residual, heads, list(query_keys), eps


class Key(NamedTuple):
    """What dispatch knows of a call: L tokens an image, M of all, both None while unknown.

    `before` are K and what the steps of qkv put out, 3 H d last, or H d and twice the sum of `query_keys`; `after` H d
    and what those of proj put out. `more`: how many columns each step has beside those.
    """

    M: int | None
    L: int | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    heads: int
    residual: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    more: tuple[int, ...] = ()
    normed: bool = False
    query_keys: tuple[int, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Of everything that is multiplied, and of what comes out."""
        return self.before + self.after

    @property
    def weights(self) -> int:
        """Elements of all W."""
        pairs = [*pairwise(self.before), *pairwise(self.after)]
        more = self.more or (0,) * len(pairs)
        return sum((K + R) * N for (K, N), R in zip(pairs, more, strict=True))


def roofline(key: Key, ceilings: registry.Ceilings | None = None) -> registry.Roofline:
    """`2 M` operations a weight, `4 M L H d` of attention, over the bytes of x, y, residual and a byte a weight.

    With narrower queries and keys their sum takes the place of one of the two `H d` that are `2 H d`.
    """
    M, K, D, N = key.M or 0, key.before[0], key.after[0], key.after[-1]
    both = D + (sum(key.query_keys) or D)
    size = key.dtype.itemsize * M * (K + N + key.residual * N) + key.weights
    return registry.Roofline.of(2 * M * key.weights + 2 * M * (key.L or 0) * both, size, torch.int8, ceilings)


def _describe(
    M: int | None, x: Tensor, norm: Sequence[Tensor], qkv: Sequence[Maybe], proj: Sequence[Maybe], residual: Maybe,
    heads: int, query_keys: Sequence[int], eps: float,
) -> Key:  # fmt: skip
    if x.dim() != 3 or not x.is_floating_point():
        raise InputError(f"{OP}: x is {x.dtype} {list(x.shape)}, expected floating point [B, L, K]")
    for name, flat in (("qkv", qkv), ("proj", proj)):
        if not flat or len(flat) % _PARTS or any(t is None for i, t in enumerate(flat) if (i + 1) % _PARTS):
            raise InputError(f"{OP}: {name} has {len(flat)} parts, expected {', '.join(Step._fields)} of each step")
    before, more = int8_chain.check_steps(OP, x, x.shape[-1], steps(qkv))
    values = _check_heads(before[-1], heads, query_keys)
    after, others = int8_chain.check_steps(OP, x, values, steps(proj))
    int8_chain.check_norm(OP, x, norm, eps)
    check_added(OP, x, after[-1], residual)
    return Key(
        M, x.shape[1], tuple(before), tuple(after), heads, residual is not None, x.dtype, x.device, (*more, *others),
        bool(norm), tuple(query_keys),
    )  # fmt: skip


def _check_heads(N: int, heads: int, query_keys: Sequence[int]) -> int:
    """How many channels of values qkv puts out; `InputError` where its N do not fit the heads."""
    if not query_keys:
        if heads < 1 or N % (3 * heads):
            raise InputError(f"{OP}: qkv puts out {N} channels, expected 3 for each entry of {heads} heads")
        return N // 3
    both = 2 * sum(query_keys)
    if heads < 1 or N - both < heads or (N - both) % heads:
        beside = f"expected 1 for each entry of {heads} heads beside {both} of queries and keys"
        raise InputError(f"{OP}: qkv puts out {N} channels, {beside}")
    d = (N - both) // heads
    if len(query_keys) != heads or not 0 < min(query_keys) <= max(query_keys) <= d:
        raise InputError(f"{OP}: query_keys is {list(query_keys)}, expected {heads} widths from 1 to {d}")
    return N - both


_call = register_running_op(
    "int8_attention(Tensor x, Tensor[] norm, Tensor?[] qkv, Tensor?[] proj, Tensor? residual, int heads, "
    "int[] query_keys, float eps) -> Tensor",
    reference,
    key=Key,
    describe=_describe,
    roofline=roofline,
)
