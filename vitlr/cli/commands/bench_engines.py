"""`vitlr bench --engines`: one model in several engines, in turns, with its accuracy in each."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitlr.cli.result import Result, table, wrapped
from vitlr.cli.timed import throughputs
from vitlr.data.preprocessing import input_size
from vitlr.engines.runners import runners
from vitlr.engines.running import Engine
from vitlr.measuring.evaluation import evaluate
from vitlr.runtime.progress import bar


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
        found = runners(model, engines, Path(folder), precision)
        times = throughputs(found, sizes, shape, repeats, "compile")
        accuracy: dict[str, Any] = {}
        for name, runner in found.items() if loader is not None else ():
            with bar(f"validating in {name}", loader.images) as progress:
                accuracy[name] = evaluate(runner, loader, progress=progress).to_dict()
        int8 = {name: runner.int8 for name, runner in found.items() if isinstance(runner, Engine)}
    rows = [
        {"batch_size": size, "engine": name, **time, "speedup": at_size[engines[0]]["batch_ms"] / time["batch_ms"]}
        for size, at_size in zip(sizes, times, strict=True)
        for name, time in at_size.items()
    ]
    values = {"model": called, "precision": precision, "threads": torch.get_num_threads(), "int8": int8}
    values |= {"results": rows, "accuracy": accuracy}
    return Result(values, _text(values))


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
