"""What a plan says of time: what was promised, for which batch on which machine, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from vitlr.runtime.kinds import NONE, number, text, whole

KEPT = 0.1  # within so much of it a promise is kept
LATENCY: dict[str, Any] = {
    "batch_size": whole(1, 2**31),
    "threads": whole(1, 2**20),
    "dtype": text(64),
    "machine": text(2000),
    "dense_ms": number(0, 1e12),
    "promised_ms": number(0, 1e12),
    "correction": number(0, 1e6),
    "measured_dense_ms": number(0, 1e12) | NONE,
    "measured_ms": number(0, 1e12) | NONE,
}


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a batch: of the dense model, promised by the table and, once it was built, measured.

    `correction` is what this plan should take over what the table says, by the plans before it that were tried.
    """

    batch_size: int
    threads: int
    dtype: str
    machine: str
    dense_ms: float
    promised_ms: float
    correction: float = 1.0
    measured_dense_ms: float | None = None
    measured_ms: float | None = None

    @property
    def share(self) -> float:
        """What is promised of the dense model's time."""
        return self.promised_ms / self.dense_ms

    @property
    def off(self) -> float | None:
        """How far the share of the dense model's time, both measured in turns, lies from what was promised."""
        if not self.measured_ms or not self.measured_dense_ms:
            return None
        return self.measured_ms / self.measured_dense_ms / self.share - 1

    @property
    def kept(self) -> bool | None:
        """Whether the promise was kept; None where nothing was measured."""
        return None if self.off is None else abs(self.off) <= KEPT

    def measured(self, dense: float, small: float) -> Latency:
        """The same with what was measured, in ms."""
        return replace(self, measured_dense_ms=round(dense, 4), measured_ms=round(small, 4))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        what = f"batch {self.batch_size}, {self.threads} thread{'s' * (self.threads > 1)}, {self.dtype}"
        line = f"  time   {self.dense_ms:9.3f} ms -> {self.promised_ms:9.3f} ms  ({self.share:.1%} promised; {what})"
        if self.correction != 1:
            line += f"\n  tried, plans took {self.correction:.3f} times what single layers take: planned again by that"
        if self.off is None:
            return line
        found = f"  measured in turns {self.measured_dense_ms:.3f} ms -> {self.measured_ms:.3f} ms: "
        sign = "slower" if self.off > 0 else "faster"
        end = "as promised" if self.kept else f"NOT as promised, within {KEPT:.0%} was expected"
        return f"{line}\n{found}{abs(self.off):.1%} {sign}, {end}"
