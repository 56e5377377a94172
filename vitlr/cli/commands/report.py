"""`vitlr report`: one page about compressed models, to look at and to pass on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from vitlr.cli.command import takes
from vitlr.cli.options import DATA, MACHINE, OUTPUT, AsJson, BatchSize, CheckpointKey, ClassMap, Data, Limit, Workers
from vitlr.cli.result import Result
from vitlr.data.options import Preprocessing
from vitlr.engines.names import parse_engines
from vitlr.errors import InputError

DENSE = "The dense model"
_MOST = 2**24  # bytes of a file of names


@takes({DATA: Preprocessing})
def report(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="F...",
            help="Files that vitlr wrote, or folders and repositories with one.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ],
    data: Data = None,
    class_map: ClassMap = None,
    limit: Limit = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL_OR_F",
            help="Its name or file: adds agreement, KL, and the images on which they disagree most.",
            rich_help_panel=DENSE,
        ),
    ] = None,
    reference_checkpoint: Annotated[
        Path | None, typer.Option(metavar="F", help="Its weights. [default: timm's own]", rich_help_panel=DENSE)
    ] = None,
    checkpoint_key: CheckpointKey = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            metavar="F", help="Statistics that the plans were made from: shows spectra.", rich_help_panel=DENSE
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="report.html and its figures go there; earlier ones are replaced.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(
            metavar="F", help="Text file: one name a line, in the model's class order.", rich_help_panel=OUTPUT
        ),
    ] = None,
    pictures: Annotated[
        int, typer.Option(metavar="N", min=0, help="Images shown of each file.", rich_help_panel=OUTPUT)
    ] = 12,
    as_json: AsJson = False,
    engines: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Time it in these too: compile, onnxruntime, openvino. [default: the last two, where installed]",
            show_default=False,
            rich_help_panel=MACHINE,
        ),
    ] = None,
    options: Any = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
) -> Result:
    """Write one HTML page about compressed models: budget, accuracy, speed, and where they err."""
    if out is None:
        raise InputError("--out is missing: name a folder for report.html and its figures")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, expected a folder")
    for flag, value in (("--reference-checkpoint", reference_checkpoint), ("--stats", stats)):
        if value is not None and reference is None:
            raise InputError(f"{flag} goes with --reference, the dense model")
    timed = None if engines is None else parse_engines(engines)
    names = None if class_names is None else _names(class_names)
    import torch

    from vitlr.calibration.statistics import Statistics
    from vitlr.checkpoint import files as checkpoint
    from vitlr.cli.models import Source, open_model
    from vitlr.data.loader import open_data
    from vitlr.reporting.drawing import check_drawing
    from vitlr.reporting.judging import classifies
    from vitlr.reporting.report import report as written

    check_drawing()
    first = checkpoint.load(files[0])
    dense = None
    if reference is not None:
        dense = open_model(reference, Source(reference_checkpoint, key=checkpoint_key), device=torch.device("cpu"))
    images = None
    if data is not None:
        how: dict[str, Any] = {"class_map": class_map, "batch_size": batch_size, "workers": workers, "limit": limit}
        labels = True if dense is None else None if classifies(first) else False
        images = open_data(data, first, **how, **options, need_labels=labels)
    found = None if stats is None else Statistics.load(stats)
    path = written(
        files,
        out,
        validation=images,
        reference=dense,
        stats=found,
        class_names=names,
        pictures=pictures,
        engines=timed,
        watch=_watched,
    )
    figures = sorted(str(found) for found in out.glob("*.svg"))
    size = path.stat().st_size
    values = {"out": str(path), "bytes": size, "figures": figures}
    return Result(values, f"wrote {path}: {size / 1e3:.0f} kB, and {len(figures)} figures beside it")


@contextmanager
def _watched(label: str, total: int | None = None, unit: str = "images") -> Iterator[Any]:
    from vitlr.runtime.progress import bar

    with bar(label, total, unit) as progress:
        yield progress


def _names(path: Path) -> list[str]:
    """One name a line; `InputError` for a file that is none."""
    try:
        if path.stat().st_size > _MOST:
            raise InputError(f"--class-names {path} has more than {_MOST} bytes; expected one name a line")
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise InputError(f"cannot read --class-names {path}: {cause}") from cause
