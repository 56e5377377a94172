"""`vitlr prune`: learnt gates (arXiv 2104.08500), or low-rank attention beside them (arXiv 2203.13444)."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from vitlr.cli.result import Result, resumable
from vitlr.cli.training import check_files, judge_on
from vitlr.data.options import Preprocessing
from vitlr.errors import InputError
from vitlr.pruning.options import Blending, Gating
from vitlr.runtime.fields import own
from vitlr.training.recipe import TrainRecipe

if TYPE_CHECKING:
    from torch import nn

HYBRID, TRAINING = "Low rank beside gates", "Training"


@takes({"Gates": Gating, HYBRID: Blending, TRAINING: TrainRecipe, DATA: Preprocessing})
def prune(
    model: FileOrModel,
    data: Data = None,
    val_data: ValData = None,
    limit: Limit = None,
    class_map: ClassMap = None,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    rate: Annotated[
        float | None, typer.Option(metavar="R", help="Share of the gates that goes, as in 0.4.", rich_help_panel=DATA)
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="Q:N", help="Instead of --rate: what is KEPT of the model, params:60%.", rich_help_panel=DATA
        ),
    ] = None,
    out: Out = None,
    resume: Resume = None,
    as_json: AsJson = False,
    options: Any = None,
    hybrid: Annotated[
        bool,
        typer.Option(
            "--hybrid", help="Make attention low rank first, and prune fc1 and fc2 only.", rich_help_panel=HYBRID
        ),
    ] = False,
    low_rank_only: Annotated[
        bool,
        typer.Option(
            "--low-rank-only",
            help="No gates: everything low rank to the --budget, and fine-tune.",
            rich_help_panel=HYBRID,
        ),
    ] = False,
    stats: Annotated[
        Path | None,
        typer.Option(
            metavar="F", help="Statistics for the ranks: used if there, written otherwise.", rich_help_panel=HYBRID
        ),
    ] = None,
    calibration_images: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Images that those are measured on. [default: 1000]", rich_help_panel=HYBRID
        ),
    ] = None,
    distill_loss_weight: Annotated[
        float,
        typer.Option(
            metavar="W",
            help="Share of the loss for the answers of the model given; 1 needs no labels.",
            rich_help_panel=TRAINING,
        ),
    ] = 0.0,
    finetune_epochs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Passes over the images without gates, 0 for none. [default: --epochs]",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    finetune_lr: Annotated[
        float | None, typer.Option(metavar="X", help="Their rate. [default: --lr]", rich_help_panel=TRAINING)
    ] = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
) -> Result:
    """Train gates in front of every linear, remove the channels that they close, and fine-tune what is left."""
    start = time.perf_counter()
    data, out = check_files(data, out, resume)
    blended = _check_blend(hybrid, low_rank_only, stats, calibration_images, budget, rate, options)
    args = model_arguments(img_size, num_classes, model_kwargs)
    from vitlr.checkpoint import files, origins
    from vitlr.cli.models import Source, check_destinations, names_a_file, open_model, parse_device
    from vitlr.data.loader import open_data
    from vitlr.data.preprocessing import input_size
    from vitlr.measuring import cost
    from vitlr.pruning.gated import prune as prune_by_gates
    from vitlr.pruning.hybrids import hybrid as prune_beside_ranks
    from vitlr.pruning.thresholds import check_wanted
    from vitlr.runtime.copies import duplicate
    from vitlr.runtime.progress import bar

    if not low_rank_only:
        check_wanted(rate, budget)
    gates: Gating = (Blending if blended else Gating).of(
        **own(Blending, options), **({"kinds": None} if low_rank_only else {})
    )
    recipe = TrainRecipe.of(**own(TrainRecipe, options), distill_loss_weight=distill_loss_weight)
    later = recipe.epochs if finetune_epochs is None else finetune_epochs
    finetune = later > 0 and replace(recipe, epochs=later, lr=recipe.lr if finetune_lr is None else finetune_lr)
    read = {"F_OR_MODEL": model, "--data": data, "--val-data": val_data}
    check_destinations(
        {"--out": out, "--stats": stats},
        {**read, "--checkpoint": checkpoint, "--class-map": class_map, "--resume": resume},
    )
    network = open_model(model, Source(checkpoint, args, key=checkpoint_key), device=parse_device(device))
    if not names_a_file(model):
        origins.check_origin(origins.find_origin(network, args))  # arguments a file cannot hold
    opened: dict[str, Any] = {"class_map": class_map, "batch_size": batch_size, "workers": workers}
    opened |= own(Preprocessing, options)
    images = open_data(data, network, **opened, limit=limit, need_labels=distill_loss_weight < 1)
    size = input_size(network)
    before = cost.measure(network, size)
    how: dict[str, Any] = {
        "budget": budget,
        "options": gates,
        "recipe": recipe,
        "finetune": finetune,
        "reference": duplicate(network) if distill_loss_weight > 0 else None,
        "validate": judge_on(val_data, network, {**opened, "need_labels": True}),
        "resume": resume,
    }
    if blended:
        how["stats"] = _statistics(
            network, open_data(data, network, **opened, limit=calibration_images or 1000), stats, resume
        )
    with resumable(resume), bar("pruning", unit="updates") as progress:
        if blended:
            small = prune_beside_ranks(network, images, rate, progress=progress, **how)
        else:
            small = prune_by_gates(network, images, rate, inplace=True, progress=progress, **how)
    report = small.vitlr_hybrid if blended else small.vitlr_pruning
    info = getattr(network, "vitlr_info", None) or {}
    record = {**report.to_dict(), "data": data, "distill_loss_weight": distill_loss_weight}  # type: ignore[operator,union-attr]
    plan = getattr(report, "plan", None)
    files.save(small, out, plan=plan, recipe={**(info.get("recipe") or {}), "pruning": record})
    after = cost.measure(small, size)
    values: dict[str, Any] = {
        "out": str(out),
        "params": before.params,
        "params_kept": after.params,
        "macs": before.macs,
        "macs_kept": after.macs,
        "bytes": out.stat().st_size,
        **_summary(report),
        "images": images.images,
        "skipped": images.skipped,
        "seconds": round(time.perf_counter() - start, 3),
    }
    macs = f"{before.macs / 1e9:.3f} G MACs -> {after.macs / 1e9:.3f} G ({after.macs / before.macs:.1%} kept)"
    return Result(values, f"{report}\n{macs}\nwrote {out}: {values['bytes'] / 1e6:.3f} MB")


def _check_blend(
    hybrid: bool,
    low_rank_only: bool,
    stats: Path | None,
    images: int | None,
    budget: str | None,
    rate: float | None,
    options: dict[str, Any],
) -> bool:
    """Whether there is low rank beside the gates; `InputError` for flags that do not go together."""
    if hybrid and low_rank_only:
        raise InputError("--hybrid has gates and --low-rank-only has none; leave one of them out")
    if not hybrid and not low_rank_only:
        given = {"--stats": stats, "--calibration-images": images}
        given |= {f"{name}=": options.get(name) for name in ("share", "rank_step", "uniform")}
        for flag, value in given.items():
            if value is not None:
                raise InputError(f"{flag} goes with --hybrid or --low-rank-only")
    if low_rank_only:
        for flag, unwanted in (("--rate", rate), ("kinds=", options.get("kinds")), ("share=", options.get("share"))):
            if unwanted is not None:
                raise InputError(f"{flag} does not go with --low-rank-only; say what is kept with --budget")
        if budget is None:
            raise InputError("--low-rank-only needs a --budget, such as params:50%")
    return hybrid or low_rank_only


def _statistics(model: nn.Module, images: Any, path: Path | None, resume: Path | None) -> Any:
    """What the ranks are chosen by, in `--stats` or beside the snapshots; a resumed run then sees the same bits."""
    from vitlr.calibration.loop import calibrate
    from vitlr.calibration.statistics import Statistics
    from vitlr.runtime.progress import bar

    if path is None and resume is not None:
        resume.mkdir(parents=True, exist_ok=True)
        path = resume / "statistics.safetensors"
    with bar("calibrating", images.images) as progress:
        found = calibrate(model, images, hidden=False, resume=path, progress=progress)
    return found if path is None else Statistics.load(path)


def _summary(report: Any) -> dict[str, Any]:
    """What programs want to know at a glance; the file has the rest."""
    pruning = getattr(report, "pruning", report)
    tuned = report.finetuning if pruning is None else pruning.finetuning
    cut = None if pruning is None else pruning.cut.to_dict()
    ranks = getattr(getattr(report, "plan", None), "ranks", None)
    notes = list(pruning.notes) if pruning is not None else [tuned.note] if tuned is not None and tuned.note else []
    return {"cut": cut, "ranks": ranks, "kept_epoch": None if tuned is None else tuned.kept, "notes": notes}
