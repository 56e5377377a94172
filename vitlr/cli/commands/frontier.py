"""`vitlr frontier`: one calibration, many budgets, and what to take of them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from vitlr.cli.command import takes
from vitlr.cli.options import (
    DATA,
    OUTPUT,
    AsJson,
    BatchSize,
    Checkpoint,
    CheckpointKey,
    ClassMap,
    Data,
    Device,
    ImgSize,
    Model,
    ModelKwargs,
    NumClasses,
    Workers,
    model_arguments,
)
from vitlr.cli.result import Result
from vitlr.data.options import Preprocessing
from vitlr.errors import InputError, Interrupted
from vitlr.planning.budgets import counted

WHAT = "What is compared"
BUDGETS = "bytes:25%,15%,12%,10%,params:80%,60%"
HELD_OUT = 5  # without --val, one image of so many is kept to judge by


@takes({DATA: Preprocessing})
def frontier(
    model: Model,
    data: Data = None,
    val: Annotated[
        str | None,
        typer.Option(
            metavar="TAR_OR_DIR",
            help="Other images to judge by, labelled or not. [default: a fifth of --data, held out]",
            rich_help_panel=DATA,
        ),
    ] = None,
    class_map: ClassMap = None,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, help="Calibrate on N images at most.", rich_help_panel=DATA)
    ] = 1000,
    val_limit: Annotated[
        int, typer.Option(metavar="N", min=1, help="Judge by N images at most.", rich_help_panel=DATA)
    ] = 2000,
    budgets: Annotated[
        str,
        typer.Option(
            metavar="Q:N,N,Q:N",
            help="What is KEPT, each in turn; a share goes on with the quantity before it.",
            rich_help_panel=WHAT,
        ),
    ] = BUDGETS,
    lose: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            help="Points of top-1 that may be lost in the advice. [default: 0.5; without labels 2, of agreement]",
            rich_help_panel=WHAT,
        ),
    ] = None,
    rivals: Annotated[
        bool,
        typer.Option(
            "--rivals/--no-rivals", help="With plain int8 and int4 rounding beside them.", rich_help_panel=WHAT
        ),
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Keep statistics, models, rows and the figure there; the next run goes on from them.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: AsJson = False,
    options: Any = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
) -> Result:
    """Try many budgets from one calibration, and say which to take: accuracy against bytes and time."""
    wanted = read_budgets(budgets)
    if data is None:
        raise InputError("--data is missing: give a few hundred images, a folder, a .tar or hfds/NAME")
    args = model_arguments(img_size, num_classes, model_kwargs)
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, expected a folder")
    from vitlr.checkpoint import origins
    from vitlr.cli.models import Source, open_model, parse_device
    from vitlr.data.loader import open_data
    from vitlr.reporting.drawing import can_draw
    from vitlr.reporting.frontier import frontier as measured
    from vitlr.reporting.judging import classifies

    network = open_model(model, Source(checkpoint, args, key=checkpoint_key), device=parse_device(device))
    origins.check_origin(origins.find_origin(network, args))  # arguments a file cannot hold
    how: dict[str, Any] = {"class_map": class_map, "batch_size": batch_size, "workers": workers, **options}
    labels: dict[str, Any] = {"need_labels": None if classifies(network) else False}
    if val is None:
        there = open_data(data, network, **how).images
        judged = min(val_limit, max(there // HELD_OUT, 1))
        if there < 2:
            raise InputError("--data has one image; give more, or others to judge by with --val")
        validation = open_data(data, network, **how, **labels, limit=judged)
        calibration = open_data(data, network, **how, skip=judged, limit=limit)
    else:
        calibration = open_data(data, network, **how, limit=limit)
        validation = open_data(val, network, **how, **labels, limit=val_limit)
    found = measured(
        network, calibration, validation, wanted, folder=out, points=lose, rivals=rivals, watch=_watched(out)
    )
    said = [str(found)]
    values: dict[str, Any] = {**found.to_dict(), "out": None if out is None else str(out), "figure": None}
    if out is not None and can_draw():
        for ending in ("svg", "png"):
            found.draw(out / f"frontier.{ending}")
        values["figure"] = str(out / "frontier.svg")
        said.append(f"models, frontier.svg and frontier.png: {out}")
    elif out is not None:
        said.append(f"the figure needs matplotlib: pip install 'vitlr[figures]'\nmodels: {out}")
    return Result(values, "\n".join([*said, textwrap.fill(validation.made, 80)]))


def read_budgets(text: str) -> list[str]:
    """`bytes:50%,25%,params:60%` one by one; `InputError` where one cannot be read, or there are two alike."""
    found: list[str] = []
    quantity = ""
    for part in text.split(","):
        if ":" in part:
            quantity = part.partition(":")[0]
        elif not quantity:
            raise InputError(f"--budgets {text!r} cannot be read: the first names a quantity, as in bytes:50%,25%")
        budget = str(counted(part.strip() if ":" in part else f"{quantity}:{part.strip()}"))
        if budget in found:
            raise InputError(f"--budgets names {budget} twice")
        found.append(budget)
    return found


def _watched(out: Path | None) -> Any:
    """A bar for every step, and what an interrupt is told."""

    @contextmanager
    def watch(label: str, total: int | None = None, unit: str = "images") -> Iterator[Any]:
        from vitlr.runtime.progress import bar

        try:
            with bar(label, total, unit) as progress:
                yield progress
        except Interrupted:
            raise
        except KeyboardInterrupt as cause:
            there = "with --out DIR the next run would go on where this one stopped"
            raise Interrupted(there if out is None else "run the same command again to go on") from cause

    return watch
