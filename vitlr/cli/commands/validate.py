"""`vitlr validate`: accuracy with its interval, and how far a model is from the one it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitlr.cli.command import takes
from vitlr.cli.options import (
    DATA,
    AsJson,
    BatchSize,
    Checkpoint,
    CheckpointKey,
    ClassMap,
    Data,
    Device,
    FileOrModel,
    ImgSize,
    Limit,
    ModelKwargs,
    NumClasses,
    Precision,
    Workers,
    model_arguments,
)
from vitlr.cli.result import Result, wrapped
from vitlr.data.options import Preprocessing
from vitlr.errors import InputError


@takes({DATA: Preprocessing})
def validate(
    model: FileOrModel,
    data: Data = None,
    class_map: ClassMap = None,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL_OR_F",
            help="Compare with this model: agreement and KL divergence.",
            rich_help_panel=DATA,
        ),
    ] = None,
    reference_checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="F",
            help="Weights of the reference. [default: --checkpoint where F_OR_MODEL is a file]",
            rich_help_panel=DATA,
        ),
    ] = None,
    limit: Limit = None,
    as_json: AsJson = False,
    options: Any = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
    precision: Precision = "float32",
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
) -> Result:
    """Measure top-1 and top-5 on labelled images, and agreement with a reference."""
    if data is None:
        raise InputError("--data is missing: give a folder of images, a .tar or hfds/NAME")
    args = model_arguments(img_size, num_classes, model_kwargs)
    from vitlr.cli.models import Source, open_pair, parse_device, parse_precision
    from vitlr.data.loader import open_data
    from vitlr.measuring.evaluation import evaluate
    from vitlr.runtime.progress import bar

    where, dtype = parse_device(device), parse_precision(precision)
    source = Source(checkpoint, args, key=checkpoint_key)
    network, other = open_pair(model, source, reference, reference_checkpoint, device=where, dtype=dtype)
    how: dict[str, Any] = {"class_map": class_map, "batch_size": batch_size, "workers": workers, "limit": limit}
    loader = open_data(data, network, **how, **options, need_labels=True if other is None else None)
    with bar("validating", loader.images) as progress:
        metrics = evaluate(network, loader, other, progress=progress)
    return Result(metrics.to_dict(), "\n  ".join([f"{model}:", *metrics.lines()]) + f"\n{wrapped(loader.made)}")
