"""What is timed, by name: each a function of a subject and the folder in which its files are made once and kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitlr
from bench.compare.engines import HALF, In, dense_onnx, made, nncf_onnx, nncf_openvino
from bench.compare.frontier.rivals import SUBSET
from bench.compare.frontier.subjects import Subject
from vitlr.compression import compressed
from vitlr.engines.export import export
from vitlr.engines.running import OnnxRuntime, OpenVino
from vitlr.measuring import clock

Make = Callable[[Subject, Path], nn.Module]
BATCH = 8  # that budgets of latency count for
RANGED = 100  # of the calibration images, for the ranges of a model that a plan made


def images(subject: Subject, count: int) -> list[torch.Tensor]:
    """The first so many calibration images, in batches; all where there are fewer."""
    found, left = [], count
    for batch, _ in islice(iter(subject.images), -(-count // 8)):
        found.append(batch[:left])
        left -= len(found[-1])
        if left == 0:
            break
    return found


def statistics(subject: Subject, folder: Path) -> vitlr.Statistics:
    """What every plan and dense int8 come from: as many images as NNCF sees."""

    def write(path: Path) -> None:
        vitlr.calibrate(subject.model, images(subject, SUBSET), extras=("ranges",)).save(path)

    return vitlr.Statistics.load(made(folder / "statistics.safetensors", write))


def planned(method: str, share: int, subject: Subject, folder: Path) -> nn.Module:
    """Our model of so many percent of the parameters, in float32."""

    def write(path: Path) -> None:
        known = subject.spectra.get(method)
        how: dict[str, Any] = {"method": method, "spectra": known}
        plan = vitlr.plan(subject.model, statistics(subject, folder), f"params:{share}%", **how)
        subject.spectra[method] = plan.spectra
        vitlr.save(vitlr.apply(subject.model, plan), path, plan=plan)

    return vitlr.load(made(folder / f"{method}-{share}.safetensors", write))


def planned_int8(method: str, share: int, subject: Subject, folder: Path) -> nn.Module:
    """The same, multiplying bytes by the ranges that it itself sees."""

    def write(path: Path) -> None:
        small = planned(method, share, subject, folder)
        how: dict[str, Any] = {"objective": "loss", "hidden": False, "extras": ("ranges",)}
        ranges = vitlr.calibrate(small, images(subject, RANGED), **how)
        vitlr.save(vitlr.fuse(small, bits=8, stats=ranges), path)

    return vitlr.load(made(folder / f"{method}-{share}-int8.safetensors", write))


def dense_int8(subject: Subject, folder: Path) -> nn.Module:
    """The dense model, multiplying bytes."""

    def write(path: Path) -> None:
        vitlr.save(vitlr.fuse(subject.model, bits=8, stats=statistics(subject, folder)), path)

    return vitlr.load(made(folder / "dense-int8.safetensors", write))


def in_time(percent: int, subject: Subject, folder: Path) -> nn.Module:
    """What a budget of so many percent of dense int8's time, in bfloat16 like it, comes to."""

    def write(path: Path) -> None:
        model = copy.deepcopy(subject.model).bfloat16()
        shown = next(iter(subject.images))[0][:BATCH].bfloat16()
        runs = {"int8": (In(dense_int8(subject, folder), torch.bfloat16).model, shown)}
        budget = f"latency:{percent / 100 * clock.race(runs, torch.get_num_threads())['int8']:.2f}ms"
        how: dict[str, Any] = {"batch_size": BATCH, "threads": torch.get_num_threads()}
        stats = folder / "statistics-bfloat16.safetensors"
        seen = [batch.bfloat16() for batch in images(subject, SUBSET)]
        done = compressed(model, seen, budget, stats=stats, **how)
        vitlr.save(done.model, path, plan=done.plan)

    return vitlr.load(made(folder / f"latency-{percent}.safetensors", write))


def own(model: Callable[[Subject, Path], nn.Module]) -> Make:
    """On our kernels, what is not in bytes in bfloat16."""
    return lambda s, f: vitlr.fuse(In(model(s, f), torch.bfloat16), inplace=True)


def through_openvino(name: str, model: Callable[[Subject, Path], nn.Module]) -> Make:
    """Exported, and run there with bfloat16 for what is not in bytes."""

    def make(subject: Subject, folder: Path) -> nn.Module:
        def write(path: Path) -> None:
            export(model(subject, folder), path, images=images(subject, 8)[0])

        return OpenVino(made(folder / f"{name}.onnx", write), precision=HALF)

    return make


def compiled(model: Callable[[Subject, Path], nn.Module]) -> Make:
    """By torch.compile, for each size anew."""
    return lambda s, f: torch.compile(model(s, f), dynamic=False)  # type: ignore[return-value]


def torchao(subject: Subject, folder: Path) -> nn.Module:
    """Weights in 8 bits a row, activations in 8 bits by token as they come, the rest in bfloat16."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    half = In(subject.model, torch.bfloat16)
    quantize_(half, Int8DynamicActivationInt8WeightConfig())
    return half


def half(subject: Subject, folder: Path) -> nn.Module:
    return In(subject.model, torch.bfloat16)


def plain(subject: Subject, folder: Path) -> nn.Module:
    return subject.model


PLANS = (("joint", 80), ("joint", 60), ("joint", 40), ("widths", 60), ("lowrank", 60))
IN_TIME = (80, 60)  # percent of dense int8's time

ROWS: dict[str, Make] = {
    "torch, float32": plain,
    "torch, bfloat16": half,
    "torch compiled, float32": compiled(plain),
    "torch compiled, bfloat16": compiled(half),
    "torchao int8, compiled, the rest bfloat16": compiled(torchao),
    "ONNX Runtime, float32": lambda s, f: OnnxRuntime(dense_onnx(s, f)),
    "OpenVINO, float32": lambda s, f: OpenVino(dense_onnx(s, f)),
    "OpenVINO, bfloat16": lambda s, f: OpenVino(dense_onnx(s, f), precision=HALF),
    "NNCF int8 in ONNX Runtime": lambda s, f: OnnxRuntime(nncf_onnx(s, f)),
    "NNCF int8 in OpenVINO, the rest bfloat16": lambda s, f: OpenVino(nncf_openvino(s, f), precision=HALF),
    "vitlr int8": own(dense_int8),
    "vitlr int8 by token": own(lambda s, f: vitlr.fuse(s.model, bits=8, scales="token")),
    "vitlr int8 in OpenVINO": through_openvino("dense-int8", dense_int8),
}
SAME: dict[str, str] = {  # rows that answer as another does, but for ties: judged once
    "torch compiled, float32": "torch, float32",
    "torch compiled, bfloat16": "torch, bfloat16",
    "OpenVINO, float32": "torch, float32",
    "ONNX Runtime, float32": "torch, float32",
}


def _add(name: str, kept: str, model: Callable[[Subject, Path], nn.Module]) -> None:
    """A model on our kernels and through OpenVINO."""
    ROWS[name] = own(model)
    ROWS[f"{name} in OpenVINO"] = through_openvino(kept, model)
    SAME[f"{name} in OpenVINO"] = name


for method, share in PLANS:
    if method == "joint":
        ROWS[f"vitlr {method} {share} %, bfloat16"] = own(partial(planned, method, share))
    _add(f"vitlr {method} {share} %, int8", f"{method}-{share}-int8", partial(planned_int8, method, share))
for percent in IN_TIME:
    _add(f"vitlr latency {percent} %", f"latency-{percent}", partial(in_time, percent))
