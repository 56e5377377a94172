"""`vitlr finetune`: train a model on labelled images, with timm's recipe and the dense model's answers if wanted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vitlr.cli.options import (
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
    Workers,
    model_arguments,
)
from vitlr.cli.result import Result, resumable
from vitlr.cli.training import (
    AutoAugment,
    ClipGrad,
    ColorJitter,
    Cutmix,
    GradAccumSteps,
    Mixup,
    Opt,
    PeakLr,
    Resume,
    Sched,
    Seed,
    Smoothing,
    ValData,
    WarmupEpochs,
    check_files,
    judge_on,
)
from vitlr.errors import InputError


def finetune(
    model: FileOrModel,
    data: Data = None,
    class_map: ClassMap = None,
    checkpoint: Checkpoint = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="F", help="The trained model.")] = None,
    val_data: ValData = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL_OR_F", help="Learn this model's answers too (distillation).")
    ] = None,
    reference_checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="F", help="Weights of the reference. [default: --checkpoint where F_OR_MODEL is a file]"),
    ] = None,
    distill_loss_weight: Annotated[
        float | None, typer.Option(metavar="W", help="Its share of the loss. [default: 0.5]")
    ] = None,
    resume: Resume = None,
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Passes over the images.")] = 10,
    lr: PeakLr = 1e-4,
    opt: Opt = "adamw",
    weight_decay: Annotated[float, typer.Option(metavar="X", help="Of weights, not of biases and norms.")] = 0.05,
    sched: Sched = "cosine",
    warmup_epochs: WarmupEpochs = 0.5,
    min_lr: Annotated[float, typer.Option(metavar="X", help="Rate at the end.")] = 0.0,
    smoothing: Smoothing = 0.1,
    mixup: Mixup = 0.0,
    cutmix: Cutmix = 0.0,
    aa: AutoAugment = None,
    color_jitter: ColorJitter = 0.4,
    reprob: Annotated[float, typer.Option(metavar="P", help="Probability of random erasing.")] = 0.0,
    clip_grad: ClipGrad = 1.0,
    grad_accum_steps: GradAccumSteps = 1,
    model_ema: Annotated[bool, typer.Option("--model-ema", help="Keep the running mean of the weights.")] = False,
    model_ema_decay: Annotated[float, typer.Option(metavar="X", help="Its decay.")] = 0.9998,
    seed: Seed = 0,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    as_json: AsJson = False,
) -> Result:
    """Train a model, compressed or not, on labelled images; flags have the names of timm's train.py."""
    start = time.perf_counter()
    data, out = check_files(data, out, resume)
    if distill_loss_weight is not None and reference is None:
        raise InputError("--distill-loss-weight goes with --reference")
    args = model_arguments(img_size, num_classes, model_kwargs)
    from vitlr.checkpoint import files as checkpoint_file
    from vitlr.checkpoint import origins
    from vitlr.cli.destinations import check_destinations
    from vitlr.cli.models import Source, names_a_file, open_pair, parse_device
    from vitlr.data.loader import open_data
    from vitlr.measuring.cost import count_params
    from vitlr.runtime.progress import bar
    from vitlr.training import TrainRecipe, train

    recipe = TrainRecipe(
        epochs=epochs,
        lr=lr,
        opt=opt,
        weight_decay=weight_decay,
        sched=sched,
        warmup_epochs=warmup_epochs,
        min_lr=min_lr,
        smoothing=smoothing,
        mixup=mixup,
        cutmix=cutmix,
        aa=aa,
        color_jitter=color_jitter,
        reprob=reprob,
        clip_grad=clip_grad,
        grad_accum_steps=grad_accum_steps,
        model_ema=model_ema,
        model_ema_decay=model_ema_decay,
        distill_loss_weight=0.5 if distill_loss_weight is None else distill_loss_weight,
        seed=seed,
    )
    read = {"F_OR_MODEL": model, "--reference": reference, "--data": data, "--val-data": val_data}
    check_destinations({"--out": out}, {**read, "--checkpoint": checkpoint, "--class-map": class_map})
    source = Source(checkpoint, args)
    network, dense = open_pair(model, source, reference, reference_checkpoint, device=parse_device(device))
    if not names_a_file(model):
        origins.check_origin(origins.find_origin(network, args))  # arguments a file cannot hold
    options: dict[str, Any] = {
        "class_map": class_map,
        "batch_size": batch_size,
        "workers": workers,
        "need_labels": True,
    }
    images, validate = open_data(data, network, **options, limit=limit), judge_on(val_data, network, options)
    with resumable(resume), bar("training", unit="updates") as progress:
        report = train(network, images, recipe, reference=dense, validate=validate, resume=resume, progress=progress)
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
    return Result(values, f"{report}\nwrote {out}: {values['bytes'] / 1e6:.3f} MB")
