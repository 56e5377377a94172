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
    K = first.channels
    drawn = lambda: ((128 + 60 * torch.randn(M, K) - first.shift[:K]) / first.multiplier[:K]).to(dtype)  # noqa: E731
    x = drawn()
    for _ in range(200):  # bf16 cannot hold any number: draw again where one lies between two integers
        near = between_integers(x.double(), first)
        if not near.any():
            return x
        x = torch.where(near, drawn(), x)
    raise AssertionError("no such input was found")


def normal_and_unambiguous(
    M: int, first: Step, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x [M, K] that is so after a LayerNorm, whatever channel is redrawn moves all of its row: rows are."""
    K = first.channels
    drawn = lambda: torch.randn(M, K).to(dtype)  # noqa: E731
    x = drawn()
    for _ in range(2000):
        n = torch.nn.functional.layer_norm(x.double(), (K,), gamma.double(), beta.double(), eps)
        near = between_integers(n, first, 0.4999).any(1)
        if not near.any():
            return x
        x = torch.where(near[:, None], drawn(), x)
    raise AssertionError("no such input was found")


def between_integers(x: Tensor, first: Step, off: float = 0.45) -> Tensor:
    """[M, K]: which channels of x a step rounds to bytes from further off than `off`."""
    K, wide = first.channels, [] if first.wide is None else first.wide.tolist()
    q = x[:, [*range(K), *wide]] * first.multiplier + first.shift
    apart = (q - q.round()).abs() > off
    near = apart[:, :K].clone()
    for e, k in enumerate(wide):
        near[:, k] |= apart[:, K + e]
    return near


def columns(steps: list[Step]) -> list[list[Tensor]]:
    """Steps as the op's schema and its reference take them."""
    return [list(column) for column in zip(*steps, strict=True)]
