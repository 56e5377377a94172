"""Solved spectra in a file beside the statistics they were made from, so that a second budget costs seconds.

What takes long is kept: all ranks of every layer, and the order and losses of all widths. Whatever else a width is made
of, weights and moments, comes from the model and the statistics again.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlr.calibration.options import OBJECTIVES
from vitlr.calibration.statistics import SCHEMA as STATISTICS
from vitlr.calibration.statistics import Statistics
from vitlr.decomposition.objectives import Objective
from vitlr.decomposition.options import GRAINS, Decomposition
from vitlr.decomposition.spectra import LayerSpectrum, Spectra
from vitlr.decomposition.widths import Solved, WidthSpectrum
from vitlr.errors import InputError, RunError
from vitlr.runtime import processes, storage
from vitlr.runtime.kinds import FLAG, NAME, PLAIN, among, check, number, tuple_of, whole

SCHEMA = 1
_SUFFIX = ".safetensors"
WIDTHS = {
    "name": NAME,
    "kind": among("mlp", *GRAINS),
    "second": NAME,
    "compensated": FLAG,
    "ridge": number(0),
    "step": whole(0),
}
HEADER: dict[str, Any] = {
    "statistics": NAME,
    "objective": among(*OBJECTIVES),
    "centred": FLAG,
    "damping": number(0),
    "layers": tuple_of(NAME, 1, 2**20),
    "widths": [WIDTHS],
    "*": PLAIN,
}
_logger = logging.getLogger("vitlr")


def place(statistics: str | os.PathLike[str]) -> Path:
    """Where the spectra of a file of statistics are: `F.spectra.safetensors` for `F.safetensors`."""
    path = Path(statistics)
    return path.with_name(f"{path.name.removesuffix(_SUFFIX)}.spectra{_SUFFIX}")


@dataclass
class SpectraFile:
    """The file beside `statistics`, as far as it is of them, of this objective and of these options.

    `spectra` are those of the layers, None where there are none; `widths` what is known of each kind and name.
    Raises `InputError` for a file that is damaged or none of ours.
    """

    statistics: Path
    stats: Statistics
    objective: Objective
    options: Decomposition
    step: int
    spectra: Spectra | None = None
    widths: dict[tuple[str, str], Solved] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = place(self.statistics)
        self.digest = storage.digest_told(self.statistics, kind="statistics", schema=STATISTICS)
        if self.digest is not None and self.path.exists():
            try:
                self._read(*storage.load_tensors(self.path, kind="spectra", schema=SCHEMA))
            except InputError as cause:
                raise InputError(f"{cause}; remove {self.path}, and it is made anew") from cause

    def keep(self, spectra: Spectra) -> None:
        """Write what is solved now, if that is more than the file has; a warning where that cannot be done."""
        widths = [width for width in spectra.widths.values() if isinstance(width, WidthSpectrum)]
        known = {(width.kind, width.name) for width in widths} <= self.widths.keys()
        if self.digest is None or (self.spectra is not None and known):
            return
        if processes.first():
            self._write(spectra, widths)
        processes.gather(None)  # a next plan reads the file

    def _write(self, spectra: Spectra, widths: Sequence[WidthSpectrum]) -> None:
        header = {**self._made, "layers": [*spectra.layers], "widths": [_row(width) for width in widths]}
        tensors = dict(_of_layers(spectra.layers.values())) | dict(_of_widths(widths))
        try:
            storage.save_tensors(self.path, tensors, header, kind="spectra", schema=SCHEMA)
        except (InputError, RunError) as cause:
            _logger.warning("the spectra are not kept for a next budget: %s", cause)

    @property
    def _made(self) -> dict[str, Any]:
        """From what, and how."""
        objective = self.objective
        made = {"objective": objective.name, "centred": objective.centred, "damping": objective.damping}
        return {"statistics": self.digest, **made}

    def _read(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        check(header, HEADER, "its header")
        if any(header[key] != value for key, value in self._made.items()):
            return
        if header["layers"] != [*self.stats.layers]:
            raise InputError("its layers are not those of the statistics")
        layers = {name: self._layer(name, tensors) for name in header["layers"]}
        made = self.objective.name, self.stats.fingerprint, self.objective.centred, self.objective.damping
        self.spectra = Spectra(layers, *made)
        for row in header["widths"]:
            solved = self._width(row, tensors)
            same = (row["compensated"], row["ridge"]) == (self.options.compensate, self.options.ridge)
            if same and self.step in (0, row["step"]):
                self.widths[row["kind"], row["name"]] = solved

    def _layer(self, name: str, tensors: Mapping[str, Tensor]) -> LayerSpectrum:
        layer = self.stats.layers[name]
        n, K, N = layer.size, layer.in_features, layer.out_features
        energies = _squares(tensors, f"{name}|energies", (n,))
        P, Q = (_taken(tensors, f"{name}|{key}", (n, n)) for key in ("P", "Q"))
        mean = _taken(tensors, f"{name}|mean", (K,)) if self.objective.centred else None
        return LayerSpectrum(name, K, N, layer.side, energies, P, Q, mean)

    def _width(self, row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Solved:
        name = f"{row['name']}|{row['kind']}"
        if row["second"] not in self.stats.layers:
            raise InputError(f"{name} is of layer {row['second']}, which the statistics do not have")
        D, N = (getattr(self.stats.layers[row["second"]], key) for key in ("in_features", "out_features"))
        order = _taken(tensors, f"{name}|order", (D,), torch.int64)
        if not torch.equal(order.sort().values, torch.arange(D)):
            raise InputError(f"{name}: its order is none of {D} neurons")
        errors = _squares(tensors, f"{name}|errors", (D + 1,))
        if f"{name}|second" not in tensors:
            return Solved(order, errors, {})
        second = _squares(tensors, f"{name}|second", (len(tensors[f"{name}|second"]), N + 1))
        ranked = _taken(tensors, f"{name}|ranked", (len(second),), torch.int64).tolist()
        if not set(ranked) < {*range(1, D)}:
            raise InputError(f"{name}: its ranks are of widths outside 1 to {D - 1}")
        return Solved(order, errors, dict(zip(ranked, second, strict=True)))


def _row(width: WidthSpectrum) -> dict[str, Any]:
    same = {"compensated": width.compensated, "ridge": width.moments.ridge, "step": width.step}
    return {"name": width.name, "kind": width.kind, "second": width.second, **same}


def _of_layers(layers: Iterable[LayerSpectrum]) -> Iterable[tuple[str, Tensor]]:
    for layer in layers:
        for key in ("energies", "P", "Q", "mean"):
            if (tensor := getattr(layer, key)) is not None:
                yield f"{layer.name}|{key}", tensor


def _of_widths(widths: Iterable[WidthSpectrum]) -> Iterable[tuple[str, Tensor]]:
    for width in widths:
        name, (order, errors, second) = f"{width.name}|{width.kind}", width.solution
        yield from ((f"{name}|order", order), (f"{name}|errors", errors))
        if second:
            yield f"{name}|ranked", torch.tensor([*second])
            yield f"{name}|second", torch.stack([*second.values()])


def _taken(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None:
        raise InputError(f"{name:.120} is missing")
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not math.isfinite(tensor.sum()):
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise InputError(f"{name:.120} is {found}, expected finite numbers {dtype} {list(shape)}")
    return tensor


def _squares(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = _taken(tensors, name, shape)
    if bool((tensor < 0).any()):
        raise InputError(f"{name:.120} holds losses below 0")
    return tensor
