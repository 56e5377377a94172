"""Tile sizes by shape: a small shipped table, the nearest row of it, and a measured row where one was asked for.

A table is `tuned/<kernel>.json`: a list of rows `{"target", "bits", <sizes>, "config": {...}, "from"}`. `from` says on
what the row rests: "compiled, not run" (registers and shared memory as the compiler reports them) or the card that
measured it. VITLR_AUTOTUNE=1 measures shapes that have no row of their own on this card and keeps what it finds in
`$XDG_CACHE_HOME/vitlr/tuned-<kernel>.json`.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from .targets import Target

SHIPPED = Path(__file__).parent / "tuned"
VARIABLE = "VITLR_AUTOTUNE"

Row = Mapping[str, Any]


def nearest(kernel: str, target: Target, dtype: torch.dtype, **sizes: int | None) -> Mapping[str, int] | None:
    """The config of the row whose sizes are nearest, in octaves, for this target and width of dtype; None: no row.

    A row measured on this machine at exactly these sizes comes first. Between equals the earlier row is taken. A size
    that is None is not known and not compared.
    """
    bits = 8 * dtype.itemsize
    known = {name: size for name, size in sizes.items() if size is not None}
    for row in measured(kernel):
        if _same(row, target, bits) and known.items() <= row.items():
            return row["config"]
    rows = [row for row in shipped(kernel) if _same(row, target, bits)]
    if not rows:
        return None
    return min(rows, key=lambda row: _octaves(row, known))["config"]


def _same(row: Row, target: Target, bits: int) -> bool:
    name = "sm_90" if target.name == "interpreter" else target.name
    return row["target"] == name and row["bits"] == bits


def _octaves(row: Row, sizes: Mapping[str, int]) -> float:
    """`Σ |log2(a / b)|` over the sizes that a row names; a size that it leaves out is as good as any."""
    return sum(abs(math.log2(max(row[name], 1) / max(size, 1))) for name, size in sizes.items() if name in row)


@cache
def shipped(kernel: str) -> tuple[Row, ...]:
    """The rows that come with the package."""
    path = SHIPPED / f"{kernel}.json"
    return tuple(json.loads(path.read_text())) if path.is_file() else ()


@cache
def measured(kernel: str) -> tuple[Row, ...]:
    """The rows measured on this machine; a file that is no table counts as none."""
    try:
        rows = json.loads(cache_file(kernel).read_text())
        return tuple(row for row in rows if {"target", "bits", "config"} <= row.keys())
    except (OSError, ValueError, AttributeError, TypeError):
        return ()


def cache_file(kernel: str) -> Path:
    """Where measured rows are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "vitlr" / f"tuned-{kernel}.json"


def autotuning() -> bool:
    """Whether the user asked for measured tiles; never while a CUDA graph is captured: it would record the trials."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def measure(
    kernel: str,
    options: Callable[[], Sequence[Any]],
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    target: Target,
    launch: Callable[[Any], Any],
) -> Any | None:
    """The fastest of a shape's configs, measured once on this machine if VITLR_AUTOTUNE asks for it; else None.

    None also where there is nothing to choose from, while a CUDA graph is captured, and once a shape has its row:
    `nearest` then finds it.
    """
    if not autotuning():
        return None
    key = {"target": target.name, "bits": 8 * dtype.itemsize, **sizes}
    if any(key.items() <= row.items() for row in measured(kernel)):
        return None
    configs = options()
    if not configs:
        return None
    kind, rows = type(configs[0]), [asdict(config) for config in configs]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else target.name
    return kind(**tune(kernel, target, dtype, sizes, rows, lambda row: launch(kind(**row)), card))


def tune(
    kernel: str,
    target: Target,
    dtype: torch.dtype,
    sizes: Mapping[str, int],
    configs: Sequence[Mapping[str, int]],
    run: Callable[[Mapping[str, int]], Any],
    card: str,
    clock: Callable[[Callable[[], Any]], float] | None = None,
) -> Mapping[str, int]:
    """Time `run(config)` for every config, keep the fastest as a row of this machine and return it.

    A config that does not compile or runs out of memory is passed over and leaves the process usable. Raises
    RuntimeError, with the last reason, if none runs. `clock` returns milliseconds (default: Triton's median).
    """
    clock = clock or _median
    times, reason = {}, "no config was offered"
    for index, config in enumerate(configs):
        try:
            times[index] = clock(partial(run, config))
        except Exception as cause:  # whatever the compiler or the driver raises: another config may do
            reason = f"{type(cause).__name__}: {cause}"
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if not times:
        raise RuntimeError(f"{kernel}: none of {len(configs)} configs runs for {dict(sizes)}; last: {reason}")
    best = configs[min(times, key=lambda index: times[index])]
    row = {"target": target.name, "bits": 8 * dtype.itemsize, **sizes, "config": dict(best), "from": card}
    others = [old for old in measured(kernel) if any(old.get(name) != row[name] for name in ("target", "bits", *sizes))]
    _write(cache_file(kernel), [*others, row])
    measured.cache_clear()
    return best


def _median(function: Callable[[], Any]) -> float:
    import triton

    return triton.testing.do_bench(function, return_mode="median")


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(rows, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
