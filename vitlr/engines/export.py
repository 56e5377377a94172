"""A model to a file that other engines run: ONNX, or OpenVINO's own, written only once an engine answers as we do."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitlr.calibration.statistics import Statistics
from vitlr.data import preprocessing
from vitlr.data.batches import first_tensor
from vitlr.engines.graphs import graph_of
from vitlr.engines.installed import is_installed, need
from vitlr.engines.names import check_target
from vitlr.engines.nibbles import OPSET, halve
from vitlr.engines.openvino_core import openvino_core
from vitlr.engines.products import products_of_bytes
from vitlr.engines.running import ENGINES, Engine, OpenVino
from vitlr.engines.spoken import halves, speak
from vitlr.errors import InputError, RunError
from vitlr.nn import Fp8Linear, TokenInt8Linear
from vitlr.runtime.contexts import evaluation_mode
from vitlr.runtime.copies import duplicate
from vitlr.runtime.modules import uncompiled
from vitlr.runtime.places import atomic_path, check_writable
from vitlr.runtime.progress import Progress
from vitlr.runtime.words import one_line
from vitlr.surgery.fusion import fuse, to_dense, unfuse

_TOLERANCE = 1e-3  # of logits in float32, relative: other sums in another order, some dozen layers deep
_FLIPS = 2.0  # times what rounding moves logits: two engines round near ties apart, and each errs as far as that
_LARGEST = 1.8e9  # bytes of numbers in one protobuf file, whose limit is 2^31


@dataclass(frozen=True)
class Exported:
    """What was written: the files and their `bytes`, MatMuls of bytes in the file, and what each engine made of it.

    `differences`: ‖theirs - ours‖ / ‖ours‖ of the logits; `int8`: MatMuls of bytes as each engine runs them.
    """

    files: list[str]
    bytes: int
    products: int
    allowed: float
    differences: dict[str, float] = field(default_factory=dict)
    int8: dict[str, int | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"wrote {', '.join(self.files)}: {self.bytes / 1e6:.3f} MB"]
        for name, difference in self.differences.items():
            seen = "" if not self.products else f",\n    {self.int8[name]} of {self.products} products in int8"
            lines.append(f"  {name}: logits within {difference:.2g} of ours (allowed {self.allowed:.2g}){seen}")
        return "\n".join(lines)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    bits: int | None = None,
    stats: Statistics | None = None,
    batch_size: int | None = None,
    dynamic_size: bool = False,
    images: Tensor | None = None,
    input_size: tuple[int, int, int] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write `model` to a file that ONNX Runtime, OpenVINO and others run, once they answer as it does.

    `to`: "onnx" or "openvino", by default as the path ends. The graph takes any number of images (`batch_size`: that
    many only) of one size (`dynamic_size`: of any that the model takes). Low rank is two MatMuls; codes of quantised
    weights stay bytes (four bits where nearly all fit), dequantised in the graph; layers of int8 are QDQ, u8 inputs by
    s8 weights in rows, all else float32. `bits=8` with `stats` makes such layers first, as `vitlr.fuse` does, with its
    `progress`. Logits are compared on `images` [B, C, H, W], by default two of noise, on the first alone and at twice
    its size if it may be: `‖theirs - ours‖ ≤ 0.001 ‖ours‖`, and of int8 layers what rounding their inputs moves logits
    by. The file is written whole or not at all; numbers above 1.8 GB lie beside it, in `.data`.

    Raises `InputError` for a place, a target or an engine that is not there, `RunError` for a model whose export
    fails (which operation, which module) and for engines that answer otherwise (by how much).
    """
    to = check_target(path, to)
    path = check_writable(path)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size={batch_size}, expected at least 1, or None for any number of images")
    model = uncompiled(model)
    if bits is not None or stats is not None:
        model = fuse(model, bits=bits, stats=stats, progress=progress)
    if any(isinstance(module, Fp8Linear) for module in model.modules()):
        raise InputError('this model multiplies 8-bit floats, which run here alone: export it before fuse(bits="fp8")')
    if any(isinstance(module, TokenInt8Linear) for module in model.modules()):
        raise InputError("this model goes by ranges of tokens, which run here alone: export it with bits=8 and stats=")
    model = unfuse(model).cpu().float()
    shown = _shown(model, images, batch_size, input_size)
    inputs = [shown, *[shown[:1]] * (batch_size is None)]
    inputs += [shown.repeat_interleave(2, 2).repeat_interleave(2, 3)[: batch_size or 1]] * dynamic_size
    spoken = duplicate(model).eval()
    expected = speak(spoken)
    notes = {"vitlr": _notes(model)}
    half = halves(spoken)
    how: dict[str, Any] = {"batch": batch_size is None, "size": dynamic_size, "opset": OPSET if half else None}
    graph = graph_of(spoken, shown, notes=notes, **how)
    if half:
        halve(graph.graph)
    products = products_of_bytes(graph.graph)
    if products < expected:
        raise RunError(f"{expected} layers multiply bytes, {products} products of the graph do; nothing was written")
    with evaluation_mode(model), torch.no_grad():
        ours = [_answer(model, x) for x in inputs]
        allowed = max(_TOLERANCE, _FLIPS * _moved(to_dense(model), inputs, ours) if expected else 0)
    with tempfile.TemporaryDirectory() as folder:
        written = _write(graph, Path(folder) / path.name, to)
        checked = _check(written, inputs, ours, allowed)
        size = sum(file.stat().st_size for file in written)
        places = [path.with_name(file.name) for file in written]
        _move(written, places)
    differences = {name: off for name, (off, _) in checked.items()}
    of_bytes = {name: count for name, (_, count) in checked.items()}
    return Exported([str(place) for place in places], size, products, allowed, differences, of_bytes)


def _moved(exact: nn.Module, inputs: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    """How far rounding moves the logits, of whichever of the inputs it moves most."""
    return max(difference(_answer(exact, x), answer) for x, answer in zip(inputs, ours, strict=True))


def difference(theirs: Tensor, ours: Tensor) -> float:
    """`‖theirs - ours‖ / ‖ours‖` in float64."""
    a, b = theirs.double(), ours.double()
    return float((a - b).norm() / b.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _answer(model: nn.Module, images: Tensor) -> Tensor:
    try:
        return first_tensor(model(images))
    except Exception as cause:  # whatever a forward raises
        raise RunError(f"the model cannot run images {list(images.shape)}: {one_line(cause)}") from cause


def _shown(model: nn.Module, images: Tensor | None, count: int | None, size: tuple[int, int, int] | None) -> Tensor:
    """Images to compare on, as many as the file takes, else up to eight: those given, over and over, or noise.

    Two at least where the file takes any number: of one, the exporter would take one for all that there ever are.
    """
    if images is None:
        size = preprocessing.input_size(model) if size is None else size
        images = torch.randn(count or 2, *size, generator=torch.Generator().manual_seed(0))
    wanted = count or min(max(len(images), 2), 8)
    return images[torch.arange(wanted) % len(images)].cpu().float()


def _notes(model: nn.Module) -> str:
    """How images are made for the model, as JSON, for those who read the file; {} where nothing says it."""
    try:
        return json.dumps(preprocessing.data_config(model))
    except InputError:
        return "{}"


def _write(graph: Any, path: Path, to: str) -> list[Path]:
    """The files of a graph in a folder of their own, the one that names the others first."""
    import onnx_ir as ir

    onnx = path.with_suffix(".onnx")
    numbers = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    ir.save(graph, onnx, external_data=f"{onnx.name}.data" if numbers > _LARGEST else None)
    if to == "onnx":
        return [file for file in (onnx, onnx.with_name(f"{onnx.name}.data")) if file.is_file()]
    openvino = need("openvino", "export to openvino")
    openvino.save_model(openvino_core().read_model(onnx), path, compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]


def _check(
    written: list[Path], inputs: Sequence[Tensor], ours: Sequence[Tensor], allowed: float
) -> dict[str, tuple[float, int | None]]:
    """How far every engine that is there is from our logits, and its MatMuls of bytes; `RunError` where too far."""
    kinds: dict[str, type[Engine]] = ENGINES if written[0].suffix == ".onnx" else {"openvino": OpenVino}
    found = {}
    for name, kind in kinds.items():
        if not is_installed(name):
            continue
        engine = kind(written[0])
        off = max(difference(engine(x), answer) for x, answer in zip(inputs, ours, strict=True))
        if not off <= allowed:
            raise RunError(
                f"{name} answers otherwise than the model: its logits are off by {off:.2g}, relative, where "
                f"{allowed:.2g} is allowed; nothing was written"
            )
        found[name] = (off, engine.int8)
    return found


def _move(written: list[Path], places: list[Path]) -> None:
    """Put files where they belong, all of them whole before the first appears, the one that names the others last."""
    if not written:
        return
    with atomic_path(places[0]) as temporary:
        shutil.copyfile(written[0], temporary)
        _move(written[1:], places[1:])
