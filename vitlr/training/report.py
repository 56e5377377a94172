"""What a training did, epoch by epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """Means over the updates of one epoch: the whole loss, its parts, and what `validate` said afterwards."""

    number: int
    loss: float
    task: float
    distillation: float | None
    penalty: float | None
    lr: float
    validation: float | None

    def __str__(self) -> str:
        parts = [f"epoch {self.number}: loss {self.loss:.4f}"]
        for name in ("distillation", "penalty"):
            if getattr(self, name) is not None:
                parts.append(f"{name} {getattr(self, name):.4f}")
        if self.validation is not None:
            parts.append(f"validation {self.validation:.2f}")
        return ", ".join(parts)


@dataclass(frozen=True)
class TrainReport:
    """The epochs that ran, what they took, which one the model was left at (0: the start), and why it stopped early."""

    epochs: tuple[Epoch, ...]
    updates: int
    images: int
    seconds: float
    kept: int
    note: str
    recipe: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "epochs": [asdict(epoch) for epoch in self.epochs]}

    def __str__(self) -> str:
        head = f"trained on {self.images} images in {self.updates} updates, {self.seconds:.1f} s"
        note = f"; {self.note}" if self.note else ""
        return "\n".join([head, *(f"  {epoch}" for epoch in self.epochs), f"  kept: epoch {self.kept}{note}"])
