"""What will be done to every layer, and why: printed as a table, kept as JSON, applied later."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vitlr.errors import InputError
from vitlr.spectra import Spectra
from vitlr.storage import atomic_path

SCHEMA = 1
_MAX_BYTES = 16 * 2**20


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its rank (None stays dense), the predicted error in the objective's unit, and the reason."""

    name: str
    in_features: int
    out_features: int
    rank: int | None
    tokens: float  # per image
    error: float
    reason: str

    @property
    def params(self) -> int:
        """Weights kept: r (N + K), or N K where the layer stays dense (biases are not counted)."""
        if self.rank is None:
            return self.in_features * self.out_features
        return self.rank * (self.in_features + self.out_features)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return round(self.params * self.tokens)


@dataclass(frozen=True)
class Plan:
    """Ranks for all layers under one budget, with the whole model's totals before and after.

    `spectra` travel with a plan that was just made; one read from JSON is applied with the statistics instead.
    """

    budget: str
    objective: str
    centred: bool
    damping: float
    layers: tuple[LayerPlan, ...]
    fingerprint: str
    params: int
    params_kept: int
    macs: int
    macs_kept: int
    bytes: int
    bytes_kept: int
    spectra: Spectra | None = field(default=None, compare=False, repr=False)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every layer that is factorised."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    @property
    def error(self) -> float:
        """Predicted error of the whole model: the sum over the layers."""
        return sum(layer.error for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, without the spectra."""
        body = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("spectra", "layers")}
        return {"schema": SCHEMA, **body, "layers": [asdict(layer) for layer in self.layers]}

    def to_json(self) -> str:
        """The same plan gives the same bytes."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, body: Any) -> Plan:
        """Read what `to_dict` gave; raises `InputError` where something is missing, of the wrong kind or newer."""
        try:
            schema = body["schema"]
            if schema != SCHEMA:
                raise InputError(f"this plan has schema {schema}, this vitlr reads {SCHEMA}; make the plan again")
            layers = tuple(LayerPlan(**layer) for layer in body["layers"])
            names = {f.name for f in fields(cls)} - {"spectra", "layers"}
            plan = cls(layers=layers, **{name: body[name] for name in names})
        except (KeyError, TypeError) as cause:
            raise InputError(f"this is not a vitlr plan: {cause}") from cause
        for layer in plan.layers:
            ok = layer.rank is None or (
                type(layer.rank) is int and 1 <= layer.rank <= min(layer.in_features, layer.out_features)
            )
            if not ok:
                raise InputError(
                    f"layer {layer.name}: rank {layer.rank!r} does not fit {layer.out_features}x{layer.in_features}"
                )
        return plan

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` gave."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as cause:
            raise InputError(f"this plan is not JSON ({cause}); make it again") from cause
        return cls.from_dict(body)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON, atomically."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote."""
        path = Path(path)
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise InputError(f"{path} has more than {_MAX_BYTES} bytes; that is no plan")
            return cls.from_json(path.read_text())
        except (OSError, UnicodeDecodeError) as cause:
            raise InputError(f"cannot read the plan {path}: {cause}") from cause

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  {'W':>11}  {'rank':>5}  {'error':>9}  {'params':>10}  {'MACs':>8}  why"]
        for layer in self.layers:
            shape = f"{layer.out_features}x{layer.in_features}"
            rank = "dense" if layer.rank is None else str(layer.rank)
            lines.append(
                f"{layer.name:<{width}}  {shape:>11}  {rank:>5}  {layer.error:>9.3g}  {layer.params:>10,}  "
                f"{layer.macs / 1e6:>7.1f}M  {layer.reason}"
            )
        lines.append(
            f"{self.budget}, objective {self.objective}: {len(self.ranks)} of {len(self.layers)} layers factorised, "
            f"predicted error {self.error:.4g}"
        )
        for what, unit, scale in (("params", "M", 1e6), ("macs", "G", 1e9), ("bytes", "MB", 1e6)):
            before, after = getattr(self, what), getattr(self, f"{what}_kept")
            lines.append(
                f"  {what:<6} {before / scale:9.3f} {unit} -> {after / scale:9.3f} {unit}  ({after / before:.1%} kept)"
            )
        return "\n".join(lines)
