"""`vitlr prune`: learnt gates (arXiv 2104.08500), or low-rank attention beside them (arXiv 2203.13444)."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from torch import nn


def prune(
    model: FileOrModel,
    data: Data = None,
    class_map: ClassMap = None,
    checkpoint: Checkpoint = None,
    rate: Annotated[float | None, typer.Option(metavar="R", help="Share of the gates that goes, as in 0.4.")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="Q:N", help="Instead of --rate: what is KEPT of the model, params:60%.")
    ] = None,
    thresholds: Annotated[
        str, typer.Option(metavar="NAME", help="Compare gates over all (global), by type, or per saved params.")
    ] = "global",
    kinds: Annotated[
        str | None, typer.Option("--gates", metavar="KINDS", help="Some of qkv,proj,fc1,fc2. [default: all]")
    ] = None,
    l1: Annotated[float, typer.Option(metavar="X", help="Weight of the gates' l1 norm in the loss.")] = 1e-4,
    tile: Annotated[int, typer.Option(metavar="N", min=1, help="Widths are multiples of N, 1 as published.")] = 16,
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="Make attention low rank first, and prune fc1 and fc2 only.")
    ] = False,
    low_rank_only: Annotated[
        bool, typer.Option("--low-rank-only", help="No gates: everything low rank to the --budget, and fine-tune.")
    ] = False,
    share: Annotated[
        float | None, typer.Option(metavar="S", help="What attention keeps of its weights. [default: 0.5]")
    ] = None,
    rank_step: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ranks are multiples of N. [default: 16]")
    ] = None,
    allocated: Annotated[
        bool, typer.Option("--allocated", help="Ranks by one budget over all layers, not the same share each.")
    ] = False,
    stats: Annotated[
        Path | None, typer.Option(metavar="F", help="Statistics for the ranks: used if there, written otherwise.")
    ] = None,
    calibration_images: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Images that those are measured on. [default: 1000]")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="F", help="The pruned model.")] = None,
    val_data: ValData = None,
    distill_loss_weight: Annotated[
        float,
        typer.Option(metavar="W", help="Share of the loss for the answers of the model given; 1 needs no labels."),
    ] = 0.0,
    resume: Resume = None,
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Passes over the images with gates.")] = 10,
    finetune_epochs: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="And without them, 0 for none. [default: --epochs]")
    ] = None,
    lr: PeakLr = 1e-4,
    finetune_lr: Annotated[
        float | None, typer.Option(metavar="X", help="That of the fine-tuning. [default: --lr]")
    ] = None,
    opt: Opt = "adamw",
    weight_decay: Annotated[float, typer.Option(metavar="X", help="Of weights, not of biases and gates.")] = 0.05,
    sched: Sched = "cosine",
    warmup_epochs: WarmupEpochs = 0.5,
    smoothing: Smoothing = 0.1,
    mixup: Mixup = 0.0,
    cutmix: Cutmix = 0.0,
    aa: AutoAugment = None,
    color_jitter: ColorJitter = 0.4,
    clip_grad: ClipGrad = 1.0,
    grad_accum_steps: GradAccumSteps = 1,
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
    """Train gates in front of every linear, remove the channels that they close, and fine-tune what is left."""
    start = time.perf_counter()
    data, out = check_files(data, out, resume)
    ranks = _Ranks(hybrid, low_rank_only, share, rank_step, allocated, stats, calibration_images)
    ranks.check(budget, rate, kinds)
    args = model_arguments(img_size, num_classes, model_kwargs)
    from vitlr.checkpoint import files as checkpoint_file
    from vitlr.checkpoint import origins
    from vitlr.cli.destinations import check_destinations
    from vitlr.cli.models import Source, names_a_file, open_model, parse_device
    from vitlr.data.loader import data_config, open_data
    from vitlr.measuring import cost
    from vitlr.pruning.gated import prune as prune_by_gates
    from vitlr.pruning.sites import FEED_FORWARD, KINDS, parse_kinds
    from vitlr.pruning.thresholds import check_wanted
    from vitlr.runtime.progress import bar
    from vitlr.training import TrainRecipe

    wanted: dict[str, Any] = {"budget": budget, "thresholds": thresholds, "l1": l1, "tile": tile}
    if not low_rank_only:
        check_wanted(rate, budget, thresholds, tile)
        wanted["kinds"] = parse_kinds(kinds or (FEED_FORWARD if hybrid else KINDS))
    recipe = TrainRecipe(
        epochs=epochs,
        lr=lr,
        opt=opt,
        weight_decay=weight_decay,
        sched=sched,
        warmup_epochs=warmup_epochs,
        smoothing=smoothing,
        mixup=mixup,
        cutmix=cutmix,
        aa=aa,
        color_jitter=color_jitter,
        clip_grad=clip_grad,
        grad_accum_steps=grad_accum_steps,
        distill_loss_weight=distill_loss_weight,
        seed=seed,
    )
    later = epochs if finetune_epochs is None else finetune_epochs
    finetune = later > 0 and replace(recipe, epochs=later, lr=lr if finetune_lr is None else finetune_lr)
    read = {"F_OR_MODEL": model, "--data": data, "--val-data": val_data}
    check_destinations({"--out": out, "--stats": stats}, {**read, "--checkpoint": checkpoint, "--class-map": class_map})
    network = open_model(model, Source(checkpoint, args), device=parse_device(device))
    if not names_a_file(model):
        origins.check_origin(origins.find_origin(network, args))  # arguments a file cannot hold
    options: dict[str, Any] = {"class_map": class_map, "batch_size": batch_size, "workers": workers}
    images = open_data(data, network, **options, limit=limit, need_labels=distill_loss_weight < 1)
    size = tuple(data_config(network)["input_size"])
    before = cost.measure(network, size)
    how: dict[str, Any] = {
        **wanted,
        "recipe": recipe,
        "finetune": finetune,
        "reference": copy.deepcopy(network) if distill_loss_weight > 0 else None,
        "validate": judge_on(val_data, network, {**options, "need_labels": True}),
        "resume": resume,
    }
    measured = ranks.statistics(network, data, class_map, batch_size, workers, resume)
    with resumable(resume), bar("pruning", unit="updates") as progress:
        if measured is None:
            small = prune_by_gates(network, images, rate, inplace=True, progress=progress, **how)
        else:
            small = ranks.run(network, images, rate, stats=measured, progress=progress, **how)
    report = small.vitlr_pruning if measured is None else small.vitlr_hybrid
    info = getattr(network, "vitlr_info", None) or {}
    record = {**report.to_dict(), "data": data, "distill_loss_weight": distill_loss_weight}  # type: ignore[operator,union-attr]
    plan = getattr(report, "plan", None)
    checkpoint_file.save(small, out, plan=plan, recipe={**(info.get("recipe") or {}), "pruning": record})
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


@dataclass(frozen=True)
class _Ranks:
    """What `--hybrid` and `--low-rank-only` ask for; None leaves a choice to the default."""

    hybrid: bool
    low_rank_only: bool
    share: float | None
    rank_step: int | None
    allocated: bool
    stats: Path | None
    images: int | None

    def check(self, budget: str | None, rate: float | None, kinds: str | None) -> None:
        """Refuse flags that do not go together."""
        if self.hybrid and self.low_rank_only:
            raise InputError("--hybrid has gates and --low-rank-only has none; leave one of them out")
        if not self.hybrid and not self.low_rank_only:
            given = {
                "--share": self.share,
                "--rank-step": self.rank_step,
                "--allocated": self.allocated or None,
                "--stats": self.stats,
                "--calibration-images": self.images,
            }
            for flag, value in given.items():
                if value is not None:
                    raise InputError(f"{flag} goes with --hybrid or --low-rank-only")
        if self.low_rank_only:
            for flag, unwanted in (("--rate", rate), ("--gates", kinds), ("--share", self.share)):
                if unwanted is not None:
                    raise InputError(f"{flag} does not go with --low-rank-only; say what is kept with --budget")
            if budget is None:
                raise InputError("--low-rank-only needs a --budget, such as params:50%")
        if self.share is not None and not 0 < self.share < 1:
            raise InputError(f"--share {self.share:g}, expected what the attention keeps, between 0 and 1")

    def statistics(
        self,
        model: nn.Module,
        data: str,
        class_map: Path | None,
        batch_size: int,
        workers: int | None,
        resume: Path | None,
    ) -> Any:
        """What the ranks are chosen by; None where there are none to choose."""
        if not self.hybrid and not self.low_rank_only:
            return None
        from vitlr.anatomy import linears
        from vitlr.calibration.statistics import Statistics
        from vitlr.cli.statistics import Request, statistics_for

        path = self.stats
        if path is None and resume is not None:
            resume.mkdir(parents=True, exist_ok=True)
            path = resume / "statistics.safetensors"
        layers = tuple(linears.targets(model))
        limit = 1000 if self.images is None else self.images
        request = Request(data, class_map, limit, batch_size, workers, None, None, None, layers, path)
        found = statistics_for(model, request)
        return found if path is None else Statistics.load(path)  # a resumed run then sees the same bits

    def run(self, model: nn.Module, images: Any, rate: float | None, **how: Any) -> nn.Module:
        """The hybrid, or low rank alone."""
        from vitlr.pruning.hybrids import SHARE, hybrid

        share = SHARE if self.share is None else self.share
        step = 16 if self.rank_step is None else self.rank_step
        how = {"kinds": None, **how, "share": share, "rank_step": step, "uniform": not self.allocated}
        return hybrid(model, images, rate, **how)


def _summary(report: Any) -> dict[str, Any]:
    """What programs want to know at a glance; the file has the rest."""
    pruning = getattr(report, "pruning", report)
    tuned = report.finetuning if pruning is None else pruning.finetuning
    cut = None if pruning is None else pruning.cut.to_dict()
    ranks = getattr(getattr(report, "plan", None), "ranks", None)
    notes = list(pruning.notes) if pruning is not None else [tuned.note] if tuned is not None and tuned.note else []
    return {"cut": cut, "ranks": ranks, "kept_epoch": None if tuned is None else tuned.kept, "notes": notes}
