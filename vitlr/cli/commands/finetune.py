"""`vitlr finetune`: train a model on labelled images, with timm's recipe and the dense model's answers if wanted."""

from __future__ import annotations

import time
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
    Out,
    Resume,
    ValData,
    Workers,
    model_arguments,
)
from vitlr.cli.result import Result, resumable, wrapped
from vitlr.cli.training import check_files, judge_on
from vitlr.data.options import Preprocessing
from vitlr.errors import InputError
from vitlr.runtime.fields import taken
from vitlr.training.recipe import TrainRecipe


@takes({"Training": TrainRecipe, DATA: Preprocessing})
def finetune(
    model: FileOrModel,
    data: Data = None,
    val_data: ValData = None,
    limit: Limit = None,
    class_map: ClassMap = None,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL_OR_F", help="Learn this model's answers too (distillation).", rich_help_panel=DATA),
    ] = None,
    reference_checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="F",
            help="Weights of the reference. [default: --checkpoint where F_OR_MODEL is a file]",
            rich_help_panel=DATA,
        ),
    ] = None,
    out: Out = None,
    resume: Resume = None,
    as_json: AsJson = False,
    options: Any = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
) -> Result:
    """Train a model, compressed or not, on labelled images; flags have the names of timm's train.py."""
    start = time.perf_counter()
    data, out = check_files(data, out, resume)
    if "distill_loss_weight" in options and reference is None:
        raise InputError("--distill-loss-weight goes with --reference")
    args = model_arguments(img_size, num_classes, model_kwargs)
    from vitlr.checkpoint import files as checkpoint_file
    from vitlr.checkpoint import origins
    from vitlr.cli.models import Source, check_destinations, names_a_file, open_pair, parse_device
    from vitlr.data.loader import open_data
    from vitlr.measuring.cost import count_params
    from vitlr.runtime import processes
    from vitlr.runtime.progress import bar
    from vitlr.training import train

    images_as = taken(Preprocessing, options)
    recipe = TrainRecipe.of(**options)
    read = {"F_OR_MODEL": model, "--reference": reference, "--data": data, "--val-data": val_data}
    check_destinations(
        {"--out": out}, {**read, "--checkpoint": checkpoint, "--class-map": class_map, "--resume": resume}
    )
    new = bool(args.keys() & {"num_classes", "img_size"})
    source = Source(checkpoint, args, new_head=new, key=checkpoint_key)
    network, dense = open_pair(model, source, reference, reference_checkpoint, device=parse_device(device))
    if not names_a_file(model):
        origins.check_origin(origins.find_origin(network, args))  # arguments a file cannot hold
    how: dict[str, Any] = {"class_map": class_map, "batch_size": batch_size, "workers": workers, "need_labels": True}
    how |= images_as
    images, validate = open_data(data, network, **how, limit=limit), judge_on(val_data, network, how)
    with resumable(resume), bar("training", unit="updates") as progress:
        report = train(network, images, recipe, reference=dense, validate=validate, resume=resume, progress=progress)
    if not processes.first():
        return Result({}, "")
    info = getattr(network, "vitlr_info", None) or {}
    record = {**report.to_dict(), "data": data, "reference": reference}
    checkpoint_file.save(network, out, recipe={**(info.get("recipe") or {}), "training": record})
    found = report.to_dict()
    values: dict[str, Any] = {
        "out": str(out),
        "params": count_params(network),
        "bytes": out.stat().st_size,
        **{key: found[key] for key in ("epochs", "kept", "updates", "images", "note")},
        "skipped": images.skipped,
        "seconds": round(time.perf_counter() - start, 3),
    }
    return Result(values, f"{report}\nwrote {out}: {values['bytes'] / 1e6:.3f} MB\n{wrapped(images.made)}")
