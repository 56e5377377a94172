"""What will be done to every layer, and why: printed as a table, kept as JSON, applied later."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vitlr.decomposition.spectra import Spectra
from vitlr.errors import InputError
from vitlr.measuring.times import Times
from vitlr.planning.latency import Latency
from vitlr.planning.options import METHODS, ROUNDED, WORDS
from vitlr.planning.plan_kinds import BITS, PLAN
from vitlr.planning.tables import KINDS, shown_plan
from vitlr.runtime.kinds import check, read_json, shown, whole
from vitlr.runtime.places import atomic_path, is_file

SCHEMA = 6  # 2 knows widths, 3 those of attention, 4 levels and bits, 5 times, 6 rounds; others are written as always
_MAX_BYTES = 16 * 2**20
_ROWS = ("layers", "widths", "others", "earlier")
_OWN = ("why", "spectra", "image", "times", "latency")  # of a plan just made, in no file
_NEW = ("method", "compensated", "ridge")  # fields that schema 1 did not have


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its rank (None stays dense), the predicted error in the objective's unit, and the reason.

    `kept_in` and `kept_out` are its sizes where its MLP is narrowed, else None.
    """

    name: str
    in_features: int
    out_features: int
    rank: int | None
    tokens: float  # per image
    error: float
    reason: str
    kept_in: int | None = None
    kept_out: int | None = None
    level: int | None = None  # its weight is rounded, at a loss of 4^(level / 8) / 12 for every entry
    bits: float | None = None  # of the file for each of its weights, as predicted
    int8: bool | None = None  # it multiplies bytes
    ms: float | None = None  # that it takes for a batch, under a budget of latency

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) as they will be."""
        return self.kept_out or self.out_features, self.kept_in or self.in_features

    @property
    def params(self) -> int:
        """Weights kept: r (N + K), or N K where the layer stays dense (biases are not counted)."""
        N, K = self.shape
        return N * K if self.rank is None else self.rank * (N + K)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return round(self.params * self.tokens)


@dataclass(frozen=True)
class WidthPlan:
    """One MLP: how many of its hidden neurons stay, the predicted error of that alone, and the reason.

    Of an attention (`kind` "channels" or "heads") the same for its value channels, one by one or in whole heads, or
    (`kind` "query_keys") for the directions in which queries meet keys, of all heads together.
    """

    name: str
    full_width: int
    width: int
    error: float
    reason: str
    kind: str = "mlp"


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix beside the linears (embedding, positions, head): bits a row, and the predicted error of that alone."""

    name: str
    bits: int
    error: float


@dataclass(frozen=True)
class Plan:
    """Ranks for all layers, and widths for MLPs and attention, under one budget, and the whole model's totals.

    `spectra`, `image`, `times`, `why` travel with a plan that was just made; one read from JSON is applied with the
    statistics. A plan of several rounds holds the `earlier` ones, which are carried out first: its rows are of what
    they leave, its budget and totals of the whole.
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
    method: str = "lowrank"
    widths: tuple[WidthPlan, ...] = ()
    others: tuple[MatrixPlan, ...] = ()  # all other matrices take 7 bits where weights are rounded
    compensated: bool = True  # the second linears make up for the neurons that are gone
    ridge: float = 0.0
    earlier: tuple[Plan, ...] = ()  # of the rounds before it, in which MLPs lose neurons
    why: str = field(default="", compare=False)  # it is this method, where nobody asked for one; not written to files
    spectra: Spectra | None = field(default=None, compare=False, repr=False)
    image: Any = field(default=None, compare=False, repr=False)  # shape and dtype of one
    latency: Latency | None = None  # what it promises, under a budget of latency
    times: Times | None = field(default=None, compare=False, repr=False)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every layer that is factorised."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    @property
    def levels(self) -> dict[str, int]:
        """Level of every layer whose weight is rounded."""
        return {layer.name: layer.level for layer in self.layers if layer.level is not None}

    @property
    def bytes_layers(self) -> list[str]:
        """The layers that multiply bytes."""
        return [layer.name for layer in self.layers if layer.int8]

    @property
    def rounds_rest(self) -> bool:
        """Whether all else is rounded as well: matrices to 7 bits a row or what `others` says, vectors to float16."""
        return bool(self.levels) or (self.method in ROUNDED and self.bytes_kept < self.bytes)

    @property
    def error(self) -> float:
        """Predicted error of the whole model: the sum over layers, widths and other matrices."""
        rows: tuple[LayerPlan | WidthPlan | MatrixPlan, ...] = (*self.layers, *self.widths, *self.others)
        return sum(row.error for row in rows)

    @property
    def narrowed(self) -> dict[str, int]:
        """Width of every MLP that loses neurons and every attention that loses channels or directions."""
        return {row.name: row.width for row in self.widths if row.width < row.full_width}

    @property
    def attention(self) -> str | None:
        """Whether attention may lose "query_keys", "channels" or "heads", or nothing."""
        return next((row.kind for row in self.widths if row.kind != "mlp"), None)

    @property
    def changes(self) -> bool:
        """Whether anything at all is to be done."""
        return bool(self.ranks or self.narrowed or self.levels or self.bytes_layers or self.rounds_rest)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, without the spectra."""
        plain = self.method == "lowrank" and not self.levels and self.latency is None and not self.earlier
        new = _NEW if plain else ()
        body = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*_ROWS, *_OWN, *new)}
        layers = [{k: v for k, v in asdict(row).items() if v is not None or k == "rank"} for row in self.layers]
        if new:
            return {"schema": 1, **body, "layers": layers}
        widths = [asdict(row) for row in self.widths]
        if self.attention is None:
            for row in widths:
                del row["kind"]
        if self.latency is not None:
            return {"schema": 5, **body, "layers": layers, "widths": widths, "latency": self.latency.to_dict()}
        if self.earlier:
            earlier = [one.to_dict() for one in self.earlier]
            return {"schema": SCHEMA, **body, "layers": layers, "widths": widths, "earlier": earlier}
        others = {"others": [asdict(row) for row in self.others]} if self.others else {}
        schema = 4 if self.method in ROUNDED or self.levels else 2 if self.attention is None else 3
        return {"schema": schema, **body, "layers": layers, "widths": widths, **others}

    def to_json(self) -> str:
        """The same plan gives the same bytes."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, body: Any) -> Plan:
        """Read what `to_dict` gave; raises `InputError` where something is missing, of the wrong kind or newer."""
        try:
            schema = body["schema"]
            if whole(1).holds(schema) and schema > SCHEMA:
                raise InputError(f"this plan has schema {schema}, this vitlr reads up to {SCHEMA}; make the plan again")
            check(body, PLAN, "this is not a vitlr plan: its JSON")
            layers = tuple(LayerPlan(**layer) for layer in body["layers"])
            names = {f.name for f in fields(cls)} - {*_ROWS, *_OWN} - (set(_NEW) if schema == 1 else set())
            widths = tuple(WidthPlan(**row) for row in body["widths"]) if schema > 1 else ()
            widths = tuple(replace(row, kind=_word(row.kind)) for row in widths)
            values = {name: body[name] for name in names}
            if "method" in values:
                values["method"] = _word(values["method"])
            latency = Latency(**body["latency"]) if "latency" in body else None
            others = tuple(MatrixPlan(**row) for row in body.get("others", ()))
            earlier = tuple(map(cls.from_dict, body.get("earlier", ())))
            plan = cls(layers=layers, widths=widths, others=others, latency=latency, earlier=earlier, **values)
        except (KeyError, TypeError) as cause:
            raise InputError(f"this is not a vitlr plan: {cause}") from cause
        plan._check()
        return plan

    def _check(self) -> None:
        """Raise `InputError` for values that do not go together."""
        if self.method not in METHODS:
            raise InputError(f"this plan's method is {self.method!r:.80}, expected one of {', '.join(METHODS)}")
        for done, one in enumerate(self.earlier, 1):
            if one.method != "widths" or one.earlier:
                what = "rounds of its own" if one.earlier else f"method {one.method!r:.80}"
                raise InputError(f"round {done} of this plan has {what}, expected widths alone; make the plan again")
        for row in self.widths:
            if row.width > row.full_width:
                raise InputError(f"{row.name}: width {row.width!r:.80} does not fit {row.full_width!r:.80}")
            if row.kind not in KINDS:
                raise InputError(f"{row.name}: a width of {row.kind!r:.80}, expected one of {', '.join(KINDS)}")
        for layer in self.layers:
            if not BITS.holds(layer.bits):
                raise InputError(f"layer {layer.name}: {shown(layer.bits)} bits a weight, expected a number")
            for kept, full in ((layer.kept_in, layer.in_features), (layer.kept_out, layer.out_features)):
                if kept is not None and kept > full:
                    raise InputError(f"layer {layer.name}: {kept!r:.80} of {full} features cannot be kept")
            if layer.rank is not None and layer.rank > min(layer.shape):
                N, K = layer.shape
                raise InputError(f"layer {layer.name}: rank {layer.rank!r} does not fit {N}x{K}")

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` gave."""
        try:
            body = read_json(text)
        except ValueError as cause:
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
        if not is_file(path):
            raise InputError(f"cannot read the plan {path}: no such file; check the path")
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise InputError(f"{path} has more than {_MAX_BYTES} bytes; that is no plan")
            return cls.from_json(path.read_text())
        except (OSError, UnicodeDecodeError) as cause:
            raise InputError(f"cannot read the plan {path}: {cause}") from cause

    def __str__(self) -> str:
        return shown_plan(self)


def _word(value: Any) -> Any:
    """Today's word for one that older files hold."""
    return WORDS.get(value, value) if isinstance(value, str) else value
