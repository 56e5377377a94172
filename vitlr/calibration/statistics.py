"""What calibration measured: sums over the images of what every linear layer sees and sends back."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vitlr.calibration.options import DEFAULT, EXTRAS, OBJECTIVES
from vitlr.calibration.sums import BY_IMAGE_HIDDEN, SCORES, SUMS, LayerStatistics, share_moments
from vitlr.errors import InputError, NumericalError
from vitlr.runtime import storage
from vitlr.runtime.compact import BITS
from vitlr.runtime.kinds import FLAG, NAME, NONE, PLAIN, among, check, number, text, tuple_of, whole
from vitlr.runtime.mapped import put_away
from vitlr.runtime.storage import fingerprint

__all__ = ["BY_IMAGE_HIDDEN", "SCORES", "LayerStatistics", "Statistics"]
SCHEMA = 2  # 1 has symmetric sums whole
_OTHER = "|"  # before the names of what is of no layer
SHAPE = tuple_of(whole(0, 2**31), 1, 8)
ROW = (NAME, whole(1, 2**31), whole(1, 2**31), NAME, whole(0))  # of a layer: name, K, N, owner, tokens
HEADER: dict[str, Any] = {
    "fingerprint": NAME,
    "objectives": tuple_of(among(*OBJECTIVES), 1, len(OBJECTIVES)),
    "extras": [among(*EXTRAS)],
    "samples": whole(1),
    "seed": whole(0, 2**64),
    "images": whole(0),
    "macs": whole(0),
    "input_shape": PLAIN,
    "notes": {
        "complete?": FLAG,
        "images_total?": whole(0) | NONE,
        "data?": text(4096) | NONE,
        "certain?": number(0, 1),
        "*": PLAIN,
    },
    "layers": [tuple_of(PLAIN, len(ROW), len(ROW))],
    "*": PLAIN,
}


@dataclass(eq=False)  # tensors have no single truth
class Statistics:
    """The moments of all layers over `images` images; additive, so runs can be merged.

    `objectives` and `extras` say what was collected, `samples` how many losses were drawn per image, `seed` from
    which seed, `macs` what one dense forward costs, `input_shape` the shape of one image, `fingerprint` of which
    weights this speaks. `whole` is false while a batch is being added, and stays so where that failed.
    """

    layers: dict[str, LayerStatistics]
    fingerprint: str
    objectives: tuple[str, ...] = (DEFAULT,)
    extras: tuple[str, ...] = ()
    samples: int = 1
    seed: int = 0
    images: int = 0
    macs: int = 0
    input_shape: Any = None
    notes: dict[str, Any] = field(default_factory=dict)
    whole: bool = True
    dtype: Any = None  # of an image, by name
    answer: str = ""  # what the model's was taken for
    others: dict[str, Tensor] = field(default_factory=dict)  # what rounding other matrices costs (calibration.others)

    @property
    def image(self) -> tuple[Any, Any]:
        """Shape and dtype of one image, of every tensor by name where the model takes several."""
        return self.input_shape, self.dtype

    def __str__(self) -> str:
        tokens = sum(layer.tokens for layer in self.layers.values())
        return (
            f"Statistics of {len(self.layers)} layers over {self.images} images ({tokens} layer tokens), "
            f"objectives {', '.join(self.objectives)}, weights {self.fingerprint}"
            + (f"; the answer is taken for {self.answer}" if self.answer else "")
        )

    @property
    def default_objective(self) -> str:
        """The objective that `plan` uses when none is named: the first one collected."""
        return self.objectives[0]

    def _kind(self) -> dict[str, Any]:
        """What must agree before two runs may be added up."""
        return {
            "weights": self.fingerprint,
            "objectives": sorted(self.objectives),
            "extras": sorted(self.extras),
            "samples": self.samples,
            "seed": self.seed,
            "layers": sorted(self.layers),
            "image sizes": self.input_shape,
            "macs": self.macs,
        }

    def check_addable(self, other: Statistics) -> None:
        """Raise `InputError` where `other` speaks of other weights, layers, objectives, image sizes or draws."""
        self.check_whole()
        other.check_whole()
        mine, theirs = self._kind(), other._kind()
        for key, value in mine.items():
            if value != theirs[key]:
                raise InputError(
                    f"these statistics do not belong together: {key} differ ({theirs[key]} against {value}); "
                    "calibrate again"
                )

    def merge(self, other: Statistics) -> Statistics:
        """Add up two runs over different images; raises `InputError` where they do not belong together."""
        self.check_addable(other)
        layers: dict[str, LayerStatistics] = {}
        for name, mine in self.layers.items():
            theirs = other.layers[name]
            sums = {key: SUMS[key].join(mine.packed(key), theirs.packed(key)) for key, _ in mine.own()}
            layers[name] = LayerStatistics(
                name, mine.in_features, mine.out_features, mine.owner, mine.tokens + theirs.tokens, **sums
            )
        share_moments(layers)
        notes = {**self.notes, **other.notes}
        others = {name: lost + other.others[name] for name, lost in self.others.items() if name in other.others}
        return replace(self, layers=layers, images=self.images + other.images, notes=notes, others=others)

    def check_whole(self) -> None:
        """Raise `InputError` where a batch was added half: an error or an interrupt came in between."""
        if not self.whole:
            raise InputError("these statistics hold half a batch, because their calibration failed; calibrate again")

    def check_fits(self, weights: Mapping[str, Tensor]) -> None:
        """Raise `InputError` unless `weights` (by layer name) are those that were calibrated."""
        self.check_whole()
        missing = [name for name in self.layers if name not in weights]
        if missing:
            raise InputError(
                f"these statistics are of another model: it has no layer {missing[0]!r}; calibrate this model"
            )
        found = fingerprint({name: weights[name] for name in self.layers})
        if found != self.fingerprint:
            raise InputError(
                f"these statistics are of other weights (fingerprint {self.fingerprint}, this model has {found}); "
                "calibrate this model, with the weights and dtype it has now"
            )

    def check_finite(self) -> None:
        """Raise `NumericalError` naming the first layer whose sums hold NaN or Inf."""
        for layer in self.layers.values():
            for key, tensor in layer.own():
                if not math.isfinite(tensor.sum()):  # one pass, where isfinite() takes several over gigabytes
                    raise NumericalError(
                        f"layer {layer.name}: the {key} sums hold NaN or Inf; check the weights and the images, "
                        "or use float32"
                    )
                put_away(tensor)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, atomically."""
        self.check_whole()
        tensors = {f"{name}|{key}": layer.packed(key) for name, layer in self.layers.items() for key, _ in layer.own()}
        tensors |= {f"{_OTHER}{name}": lost for name, lost in self.others.items()}
        header = {
            "fingerprint": self.fingerprint,
            "objectives": self.objectives,
            "extras": self.extras,
            "samples": self.samples,
            "seed": self.seed,
            "images": self.images,
            "macs": self.macs,
            "input_shape": self.input_shape,
            "notes": self.notes,
            "dtype": self.dtype,
            "answer": self.answer,
            "layers": [[s.name, s.in_features, s.out_features, s.owner, s.tokens] for s in self.layers.values()],
        }
        storage.save_tensors(path, tensors, header, kind="statistics", schema=SCHEMA)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote; raises `InputError` for files that are damaged, foreign or newer."""
        tensors, header = storage.load_tensors(path, kind="statistics", schema=SCHEMA)
        try:
            check(header, HEADER, "its header")
            shape = header["input_shape"]
            check(shape, {"*": SHAPE} if isinstance(shape, dict) else SHAPE | NONE, "its input_shape")
            others = _others(tensors)
            layers = _layers(tensors, header["layers"])
        except InputError as cause:
            raise InputError(f"{path}: its statistics are damaged ({cause}); calibrate again") from cause
        return cls(
            layers,
            header["fingerprint"],
            tuple(header["objectives"]),
            tuple(header["extras"]),
            header["samples"],
            header["seed"],
            header["images"],
            header["macs"],
            _as_tuple(shape),
            dict(header["notes"]),
            dtype=header.get("dtype"),
            answer=header.get("answer", ""),
            others=others,
        )


def _others(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is of no layer, taken out; `InputError` for what no calibration gives."""
    found = {name: tensors.pop(name) for name in [*tensors] if name.startswith(_OTHER)}
    for name, lost in found.items():
        if lost.shape != (len(BITS),) or lost.dtype != torch.float64 or not bool(((lost >= 0) & lost.isfinite()).all()):
            raise InputError(
                f"tensor {name:.120} is {lost.dtype} {list(lost.shape)}, expected {len(BITS)} sums of squares"
            )
    return {name.removeprefix(_OTHER): lost for name, lost in found.items()}


def _layers(tensors: dict[str, Tensor], rows: list[Any]) -> dict[str, LayerStatistics]:
    """The sums by layer; `InputError` for those that no calibration gives."""
    layers: dict[str, LayerStatistics] = {}
    for row in rows:
        for value, kind, what in zip(row, ROW, ("name", "in_features", "out_features", "owner", "tokens"), strict=True):
            check(value, kind, f"a layer's {what}")
        name, K, N, owner, tokens = row
        if name in layers:
            raise InputError(f"layer {name} is there twice")
        sums = {key: tensors.pop(f"{name}|{key}", None) for key in SUMS}
        layers[name] = LayerStatistics(name, K, N, owner, tokens, **sums)
        layers[name].check_shapes()
        layers[name].check_values()
    if tensors:
        raise InputError(f"tensor {min(tensors):.120} is of no layer")
    if strangers := [layer.owner for layer in layers.values() if layer.owner not in layers]:
        raise InputError(f"{strangers[0]} owns a moment and is no layer")
    share_moments(layers)
    return layers


def _as_tuple(shape: Any) -> Any:
    """JSON has lists where Python has shapes."""
    if isinstance(shape, dict):
        return {key: tuple(value) for key, value in shape.items()}
    return None if shape is None else tuple(shape)
