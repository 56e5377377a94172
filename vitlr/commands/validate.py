"""`vitlr validate`: accuracy with its interval, and how far a model is from the one it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitlr.commands._options import (
    AsJson,
    BatchSize,
    Checkpoint,
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
from vitlr.commands._result import Result
from vitlr.errors import InputError


def validate(
    model: FileOrModel,
    data: Data = None,
    class_map: ClassMap = None,
    checkpoint: Checkpoint = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL_OR_F", help="Compare with this model: agreement and KL divergence.")
    ] = None,
    reference_checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="F", help="Weights of the reference. [default: --checkpoint where F_OR_MODEL is a file]"),
    ] = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    limit: Limit = None,
    device: Device = None,
    precision: Precision = "float32",
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    as_json: AsJson = False,
) -> Result:
    """Measure top-1 and top-5 on labelled images, and agreement with a reference."""
    if data is None:
        raise InputError("--data is missing: give a folder of images, a .tar or hfds/NAME")
    args = model_arguments(img_size, num_classes, model_kwargs)
    from vitlr.commands._models import Source, names_a_file, open_model, parse_device, parse_precision
    from vitlr.data import open_data
    from vitlr.evaluation import evaluate
    from vitlr.progress import bar

    where, dtype = parse_device(device), parse_precision(precision)
    by_name = not names_a_file(model)
    reference_by_name = reference is not None and not names_a_file(reference)
    if reference is None and reference_checkpoint is not None:
        raise InputError("--reference-checkpoint goes with --reference")
    theirs = Source(reference_checkpoint, {})
    if reference_by_name:  # one --checkpoint is for the one model that needs it
        theirs = Source(reference_checkpoint or (None if by_name else checkpoint), args)
    of_model = by_name or not reference_by_name
    network = open_model(model, Source(checkpoint, args) if of_model else Source(), device=where).to(dtype)
    loader = open_data(
        data, network, class_map=class_map, batch_size=batch_size, workers=workers, limit=limit, need_labels=True
    )
    other = None
    if reference is not None:
        other = open_model(reference, theirs, device=where).to(dtype)
        _check_same_input(network, other, reference)
    with bar("validating", loader.images) as progress:
        metrics = evaluate(network, loader, other, progress=progress)
    return Result(metrics.to_dict(), f"{model}: {metrics}")


def _check_same_input(model: object, reference: object, name: str) -> None:
    """Both models see the same tensors, so those must be made the same way."""
    from vitlr.data import data_config

    ours, theirs = data_config(model), data_config(reference)  # type: ignore[arg-type]
    for key in ("input_size", "mean", "std"):
        if ours[key] != theirs[key]:
            raise InputError(
                f"the reference {name} wants {key} {theirs[key]}, the model {ours[key]}; they cannot be compared"
            )
