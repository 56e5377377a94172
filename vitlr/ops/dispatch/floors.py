"""What the floors of candidates share: whole waves of programs, separate products, and which candidate pays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vitlr.ops.dispatch import registry
from vitlr.ops.dispatch.ceilings import H200


def in_waves(
    each: float, programs: int, sms: int, size: float, dtype: torch.dtype, ceilings: registry.Ceilings
) -> float | None:
    """The roofline's µs of programs of `each` FLOPs on `sms` processors: a last wave takes as long as a full one.

    `size`: bytes that all of them move. None where the dtype's peak is not known.
    """
    return ceilings.microseconds(each * -(-programs // sms) * sms, size, dtype)


def separate(
    M: int,
    linears: Iterable[tuple[int, int, int | None]],
    passes: int,
    dtype: torch.dtype,
    ceilings: registry.Ceilings,
) -> float | None:
    """The floor in µs of linears (K, N, r) of M rows as products of their own, two where r is not None.

    `passes`: elements a row that whatever follows the products reads and writes.
    """
    size, total = dtype.itemsize, 1e6 * dtype.itemsize * M * passes / ceilings.bytes_per_s
    for K, N, r in linears:
        for k, n in ((K, N),) if r is None else ((K, r), (r, N)):
            step = ceilings.microseconds(2 * M * n * k, size * (M * (n + k) + n * k), dtype)
            if step is None:
                return None
            total += step
    return total


def pays(op: str, name: str, key: Any) -> str | None:
    """None unless another candidate has a lower floor; a card without ceilings of its own is judged as an H200."""
    limits = registry.ceilings_of(key.device) or H200
    able = [c for c in registry.candidates(op) if c.floor is not None and c.supports(key) is None]
    times = {c.name: time for c in able if c.floor is not None and (time := c.floor(key, limits)) is not None}
    if key.M is None or name not in times:
        return None
    best = min(times, key=lambda other: times[other])
    if times[best] >= times[name]:
        return None
    return f"its floor is {times[name]:.1f} µs, that of {best} {times[best]:.1f}"
