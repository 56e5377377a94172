"""A clock that reads modules instead of time: a multiplication of floats takes 4 units, one of bytes 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vitlr.nn import Int8Linear, LowRankLinear

UNIT = 1e-6
OVERHEAD = 20  # multiplications of floats that an output takes besides


class FakeClock:
    """What `clock.race` is replaced by. `drag` is what low rank costs more within a whole model than alone."""

    def __init__(self, tokens: int, drag: float = 1.0, slow_ranks: float = 1.0) -> None:
        self.tokens, self.drag, self.slow_ranks = tokens, drag, slow_ranks
        self.raced: list[str] = []
        self.threads: set[int] = set()

    def __call__(self, runs: Mapping[str, tuple[nn.Module, Any]], threads: int) -> dict[str, float]:
        self.raced += runs
        self.threads.add(threads)
        return {name: self.ms(module, x) for name, (module, x) in runs.items()}

    def ms(self, module: nn.Module, x: Any) -> float:
        rows = len(x) * (self.tokens if x.ndim == 4 else 1)
        thin = {id(part) for low in module.modules() if isinstance(low, LowRankLinear) for part in (low.down, low.up)}
        factor = self.drag if thin and x.ndim == 4 else 1.0
        slow = {part: self.slow_ranks for part in thin}
        return factor * rows * UNIT * sum(slow.get(id(part), 1.0) * _units(part) for part in module.modules())


def _units(part: nn.Module) -> float:
    if not isinstance(part, (nn.Linear, Int8Linear)):
        return 0.0
    one = 1 if isinstance(part, Int8Linear) else 4
    return part.in_features * part.out_features * one + OVERHEAD * (part.in_features + part.out_features)
