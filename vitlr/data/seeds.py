"""Which image at which step under which seed, from counting alone: a run can begin at any step and see the same."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch


class Schedule:
    """Lists of (position, seed) without end: every epoch a new order, every draw a new seed, both from counting."""

    def __init__(self, positions: Sequence[int], batch_size: int, seed: int, start: int) -> None:
        self.positions, self.batch_size, self.seed, self.start = positions, batch_size, seed, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        n, drawn = len(self.positions), self.start * self.batch_size
        epoch, order = -1, []
        while True:
            batch = []
            for k in range(drawn, drawn + self.batch_size):
                if k // n != epoch:
                    epoch = k // n
                    generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", epoch))
                    order = torch.randperm(n, generator=generator).tolist()
                batch.append((self.positions[order[k % n]], derived_seed(self.seed, "draw", k)))
            drawn += self.batch_size
            yield batch


def derived_seed(*parts: Any) -> int:
    """A seed of 32 bits that depends on all parts and on nothing else."""
    return zlib.crc32("/".join(map(str, parts)).encode())
