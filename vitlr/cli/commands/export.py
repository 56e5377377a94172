"""`vitlr export`: a model to a file that other engines run, written once they answer as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitlr.calibration.options import RANGES, Calibration
from vitlr.cli.command import takes
from vitlr.cli.options import (
    DATA,
    MODEL,
    OUTPUT,
    AsJson,
    Checkpoint,
    CheckpointKey,
    Data,
    FileOrModel,
    ImgSize,
    Limit,
    ModelKwargs,
    NumClasses,
    Out,
    Workers,
    model_arguments,
)
from vitlr.cli.result import Result
from vitlr.data.options import Preprocessing
from vitlr.engines.names import check_target
from vitlr.errors import InputError
from vitlr.runtime.fields import taken

MEASURE = "Measuring for int8"
_AT_ONCE = 32  # images of one calibration batch


@takes({MEASURE: Calibration, DATA: Preprocessing})
def export(
    model: FileOrModel,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="NAME", help="onnx or openvino. [default: as --out ends]", rich_help_panel=OUTPUT),
    ] = None,
    out: Out = None,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="8", help="Let linears multiply bytes (W8A8, QDQ); takes --data.", rich_help_panel=MEASURE
        ),
    ] = None,
    data: Data = None,
    limit: Limit = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            metavar="F", help="Statistics for --bits: used if there, written otherwise.", rich_help_panel=MEASURE
        ),
    ] = None,
    as_json: AsJson = False,
    options: Any = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            metavar="N",
            min=1,
            help="Images the file takes at once. [default: any number]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dynamic_size: Annotated[
        bool,
        typer.Option("--dynamic-size", help="Take images of any size that the model takes.", rich_help_panel=MODEL),
    ] = False,
    workers: Workers = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
) -> Result:
    """Write a model for ONNX Runtime or OpenVINO, checked there against its own answers."""
    if out is None:
        raise InputError("--out is missing: name the file to write")
    for flag, given in (("--data", data), ("--stats", stats), ("--limit", limit)):
        if given is not None and bits is None:
            raise InputError(f"{flag} goes with --bits 8, for which inputs are measured; leave it out")
    images_as = taken(Preprocessing, options)
    if bits is None and options:
        raise InputError(f"--{next(iter(options)).replace('_', '-')} goes with --bits 8; leave it out")
    if bits is not None and bits != 8:
        raise InputError(f"--bits {bits}, expected 8; for fewer run vitlr compress --bits, and export what it writes")
    if bits is not None and data is None and stats is None:
        raise InputError("--bits 8 needs images that show what layers see: add --data (a folder, a .tar or hfds/NAME)")
    check_target(out, to)
    args = model_arguments(img_size, num_classes, model_kwargs)
    import torch

    from vitlr.calibration.loop import calibrate
    from vitlr.cli.models import Source, check_destinations, open_model
    from vitlr.data.loader import open_data
    from vitlr.engines import export as engines
    from vitlr.runtime.progress import bar
    from vitlr.surgery.bytes import decode

    check_destinations({"--out F": out, "--stats": stats}, {"--data": Path(data) if data else None})
    network = open_model(model, Source(checkpoint, args, key=checkpoint_key), device=torch.device("cpu"))
    how: dict[str, Any] = {"batch_size": batch_size, "dynamic_size": dynamic_size}
    measured = None
    if bits is not None:
        decode(network)
        read: dict[str, Any] = {"batch_size": _AT_ONCE, "workers": workers, "limit": limit, **images_as}
        loader = None if data is None else open_data(data, network, **read)
        with bar("calibrating", None if loader is None else loader.images) as progress:
            measured = calibrate(
                network, loader, **options, hidden=False, extras=(RANGES,), resume=stats, progress=progress
            )
        if loader is not None:
            how["images"] = next(iter(loader.subset(range(8))))[0]
    with bar("rounding to bytes", unit="layers") as progress:
        done = engines.export(network, out, to=to, bits=bits, stats=measured, **how, progress=progress)
    return Result(done.to_dict(), str(done))
