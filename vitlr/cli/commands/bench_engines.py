"""`vitlr bench --engines`: one model in several engines, in turns, with its accuracy in each."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitlr.cli.plain_torch import PlainTorch
from vitlr.cli.result import Result, table, wrapped
from vitlr.cli.timed import throughputs
from vitlr.data.preprocessing import input_size
from vitlr.engines.export import export
from vitlr.engines.installed import is_installed, need
from vitlr.engines.running import ENGINES
from vitlr.errors import InputError
from vitlr.measuring.evaluation import evaluate
from vitlr.runtime.progress import bar
from vitlr.surgery import fusion

OURS = ("torch", "compile", "vitlr")  # plain torch; that compiled; fused, on our kernels
ALL = ("torch", "compile", *ENGINES, "vitlr")


def parse_engines(text: str) -> tuple[str, ...]:
    """Names apart by commas, or `all` that are installed. Raises `InputError` for unknown ones and missing packages."""
    if text.strip() == "all":
        return tuple(name for name in ALL if name in OURS or is_installed(name))
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in ALL:
            raise InputError(f"--engines {text!r}: {name!r} is unknown, expected some of {', '.join(ALL)}, or all")
        if name in ENGINES:
            need(name, f"--engines {name}")
    return names


def by_engine(
    called: str,
    model: nn.Module,
    engines: Sequence[str],
    sizes: Sequence[int],
    *,
    precision: str,
    repeats: int,
    loader: Any = None,
) -> Result:
    """Times of a model, in float32, in every engine, and its accuracy there where images with labels are given."""
    shape = input_size(model)
    with tempfile.TemporaryDirectory() as folder:
        runners = _runners(model, engines, Path(folder), precision)
        times = throughputs(runners, sizes, shape, repeats, "compile")
        accuracy: dict[str, Any] = {}
        for name, runner in runners.items() if loader is not None else ():
            with bar(f"validating in {name}", loader.images) as progress:
                accuracy[name] = evaluate(runner, loader, progress=progress).to_dict()
        int8 = {name: runner.int8 for name, runner in runners.items() if name in ENGINES}
    rows = [
        {"batch_size": size, "engine": name, **found, "speedup": at_size[engines[0]]["batch_ms"] / found["batch_ms"]}
        for size, at_size in zip(sizes, times, strict=True)
        for name, found in at_size.items()
    ]
    values = {"model": called, "precision": precision, "threads": torch.get_num_threads(), "int8": int8}
    values |= {"results": rows, "accuracy": accuracy}
    return Result(values, _text(values))


def _runners(model: nn.Module, engines: Sequence[str], folder: Path, precision: str) -> dict[str, Any]:
    """What answers in each engine, the model's copies in `precision`."""
    plain = fusion.unfuse(model)
    path = folder / ("model.onnx" if "onnxruntime" in engines else "model.xml")
    if any(name in ENGINES for name in engines):
        export(plain, path)
    cast = plain.to(getattr(torch, precision))
    found: dict[str, Any] = {}
    for name in engines:
        if name in ENGINES:
            found[name] = ENGINES[name](path, precision=precision)
        elif name == "vitlr":
            found[name] = fusion.fuse(cast)
        else:
            compiled: Any = torch.compile(cast, dynamic=False) if name == "compile" else cast
            found[name] = PlainTorch(compiled)
    return found


def _text(values: Mapping[str, Any]) -> str:
    head = f"{values['model']} on the CPU, {values['precision']}, {values['threads']} threads, engines in turns"
    lines = [wrapped(head)]
    for name, count in values["int8"].items():
        lines += [f"  {name} multiplies bytes in {count} of its products"] * bool(count)
    first = values["results"][0]["engine"]
    rows = [
        [
            row["engine"],
            str(row["batch_size"]),
            f"{row['batch_ms']:.2f}",
            f"{row['images_per_second']:.1f}",
            f"{row['speedup']:.2f}x",
        ]
        for row in values["results"]
    ]
    lines.append(table(["engine", "batch", "ms", "images/s", f"over {first}"], rows))
    if values["accuracy"]:
        rows = [
            [
                name,
                f"{found['top1']:.2f}",
                f"{found['top1_low']:.1f} to {found['top1_high']:.1f}",
                f"{found['top5']:.2f}",
                str(found["images"]),
            ]
            for name, found in values["accuracy"].items()
        ]
        lines.append(table(["engine", "top-1", "95 %", "top-5", "images"], rows))
    return "\n".join(lines)
