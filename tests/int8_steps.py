"""Random steps of `int8_chain`, and inputs whose rounding no error in the last bit can change."""

from __future__ import annotations

import torch
from torch import Tensor

from vitlr.ops.layers.int8_chain import Step


def step(K: int, N: int, more: int = 0) -> Step:
    """A step whose output is of size 1; its multipliers and shifts differ by column.

    `more` channels of the K have a further column.
    """
    wide = torch.randint(K, (more,), dtype=torch.int32).sort().values if more else None
    K += more
    W = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    multiplier = 40 * (0.7 + torch.rand(K))
    scale = (0.5 + torch.rand(N)) / (40 * 74 * K**0.5)
    shift = 128 + 20 * torch.randn(K)
    bias = torch.randn(N) - scale * (W.float() @ shift)
    return Step(W, scale, bias, multiplier, shift, wide)


def unambiguous(M: int, first: Step, dtype: torch.dtype = torch.float32) -> Tensor:
    """x [M, K] whose `multiplier ⊙ x + shift` lies well within half of an integer, some of them beyond 0 and 255."""
    K, wide = first.channels, [] if first.wide is None else first.wide.tolist()
    drawn = lambda: ((128 + 60 * torch.randn(M, K) - first.shift[:K]) / first.multiplier[:K]).to(dtype)  # noqa: E731
    x = drawn()
    for _ in range(200):  # bf16 cannot hold any number: draw again where one lies between two integers
        q = x[:, [*range(K), *wide]].double() * first.multiplier + first.shift
        apart = (q - q.round()).abs() > 0.45
        near = apart[:, :K].clone()
        for e, k in enumerate(wide):
            near[:, k] |= apart[:, K + e]
        if not near.any():
            return x
        x = torch.where(near, drawn(), x)
    raise AssertionError("no such input was found")


def columns(steps: list[Step]) -> list[list[Tensor]]:
    """Steps as the op's schema and its reference take them."""
    return [list(column) for column in zip(*steps, strict=True)]
