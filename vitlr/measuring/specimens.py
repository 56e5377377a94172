"""Modules of random weights whose time is that of a layer: what is timed stands alone, and its numbers do not matter.

They are of the very classes that `fuse` puts into a model, so that dispatch takes the same kernels for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from vitlr.nn import Int8Linear, Int8MLP, LowRankLinear, LowRankMLP

MOST_ROWS = 2048
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
}


@dataclass(frozen=True)
class Shape:
    """What the time of a linear (sizes K, N) or of an MLP `fc2(act(fc1(x)))` (sizes K, D, N) depends on.

    `narrows` is the place among the sizes of the one that a width changes, `rows` how many of them a batch has.
    """

    sizes: tuple[int, ...]
    rows: int
    narrows: int | None = None
    act: str = "none"
    bias: bool = True

    @property
    def timed_rows(self) -> int:
        """The rows that are timed: of more, each takes as long."""
        return min(self.rows, MOST_ROWS)

    @property
    def width(self) -> int:
        """The one that is there now; 0 where none may change."""
        return 0 if self.narrows is None else self.sizes[self.narrows]

    def at(self, width: int) -> tuple[int, ...]:
        """The sizes at a width."""
        return tuple(width if place == self.narrows else size for place, size in enumerate(self.sizes))

    def break_even(self, width: int) -> int:
        """The largest rank at which two factors have fewer weights than one matrix, of its smallest linear."""
        sizes = self.at(width)
        return min((N * K - 1) // (N + K) for K, N in pairwise(sizes))

    def named(self, width: int, rank: int | None, int8: bool, dtype: str) -> str:
        """One line for all that the time depends on but the machine."""
        sizes = "x".join(map(str, self.at(width)))
        words = ["mlp" if len(self.sizes) == 3 else "linear", sizes, f"rows={self.timed_rows}", dtype]
        words += [self.act] * (len(self.sizes) == 3) + ["no bias"] * (not self.bias)
        return " ".join([*words, *([] if rank is None else [f"rank={rank}"]), *["int8"] * int8])


def specimen(shape: Shape, width: int, rank: int | None, int8: bool, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A module in this form, and what it takes: every linear at this rank or dense, of floats or of bytes."""
    sizes = shape.at(width)
    linears = [_linear(K, N, rank, int8, shape.bias, dtype) for K, N in pairwise(sizes)]
    x = torch.randn(shape.timed_rows, sizes[0], generator=torch.Generator().manual_seed(0)).to(dtype)
    module = linears[0] if len(linears) == 1 else _Mlp(linears[0], _ACTIVATIONS[shape.act](), linears[1])
    for kind in (Int8MLP, LowRankMLP):
        if len(linears) == 2 and kind.why_not(module) is None:
            return kind(module).eval(), x
    return module.eval(), x


def is_specimen(act: str | None) -> bool:
    """Whether there are MLPs of that activation."""
    return act in _ACTIVATIONS


class _Mlp(nn.Module):
    def __init__(self, fc1: nn.Module, act: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = fc1, act, fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def _linear(K: int, N: int, rank: int | None, int8: bool, bias: bool, dtype: torch.dtype) -> nn.Module:
    if rank is None:
        return bytes_like(K, N) if int8 else nn.Linear(K, N, bias=bias).to(dtype)
    if int8:
        return LowRankLinear.from_layers(bytes_like(K, rank), bytes_like(rank, N))
    return LowRankLinear(K, N, rank, bias=bias).to(dtype)


def bytes_like(K: int, N: int) -> Int8Linear:
    """A linear of random bytes, for inputs of size 1."""
    generator = torch.Generator().manual_seed(0)
    layer = Int8Linear(K, N)
    layer.codes.copy_(torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=generator))
    layer.scale.fill_(1 / (40 * 74 * K**0.5))
    layer.multiplier.fill_(40.0)
    layer.shift.fill_(128.0)
    layer.bias.copy_(-128 * layer.scale * layer.codes.float().sum(1))
    return layer
