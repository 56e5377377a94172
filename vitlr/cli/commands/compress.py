"""`vitlr compress`: what `vitlr.compression.compressed` does, with everything that can be refused refused first."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from vitlr.calibration.options import Calibration
from vitlr.cli.command import flags_of, in_flags, takes
from vitlr.cli.options import (
    DATA,
    MACHINE,
    OUTPUT,
    AsJson,
    Checkpoint,
    CheckpointKey,
    ClassMap,
    Data,
    Device,
    ImgSize,
    Limit,
    Model,
    ModelKwargs,
    NumClasses,
    Out,
    Workers,
    model_arguments,
)
from vitlr.cli.result import Result, resumable, wrapped
from vitlr.data.options import Preprocessing
from vitlr.errors import InputError, Interrupted
from vitlr.planning.budgets import is_timed, parse_budget
from vitlr.planning.options import Planning
from vitlr.refinement.recipe import Recipe, parse_rungs
from vitlr.runtime.fields import own, taken

MEASURE, REPAIR = "Measuring", "Repairing the error"


@takes({"Method": Planning, MEASURE: Calibration, REPAIR: Recipe, DATA: Preprocessing})
def compress(
    model: Model,
    budget: Annotated[
        str,
        typer.Option(
            metavar="Q:N",
            help="What is KEPT of the whole model: params:40%, macs:1.2G, bytes:10MB, latency:50%, latency:12ms.",
            rich_help_panel=DATA,
        ),
    ],
    data: Data = None,
    limit: Limit = None,
    class_map: ClassMap = None,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    out: Out = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            metavar="F",
            help="Statistics: used if there, written otherwise; a run cut short goes on from them.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Show the plan, write no model.", rich_help_panel=OUTPUT)
    ] = False,
    plan_out: Annotated[
        Path | None, typer.Option(metavar="F", help="Write the plan as JSON.", rich_help_panel=OUTPUT)
    ] = None,
    as_json: AsJson = False,
    options: Any = None,
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="With widths or joint: narrow MLPs part of the way, measure again, go on. Each costs a calibration.",
            rich_help_panel=MEASURE,
        ),
    ] = 1,
    trials: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Try the plan part by part on a sixth of the images, and plan again by what each part costs; N times.",
            rich_help_panel=MEASURE,
        ),
    ] = 0,
    refine: Annotated[
        str,
        typer.Option(
            metavar="RUNG", help="Climb up to: none, refit, regrow or distil; or only rescale.", rich_help_panel=REPAIR
        ),
    ] = "none",
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep snapshots of trials and refinement there, and go on from them.",
            rich_help_panel=REPAIR,
        ),
    ] = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            metavar="N",
            min=1,
            help="Images in one batch; under latency the batch that it counts for. [default: 64; under latency 1]",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    workers: Workers = None,
    device: Device = None,
) -> Result:
    """Compress a trained model to a budget, from a few hundred images without labels."""
    start = time.perf_counter()
    parse_budget(budget)  # what needs no torch is refused before it is there
    parse_rungs(refine)
    for cls in (Planning, Calibration):
        cls.of(**own(cls, options))
    if out is None and not plan_only:
        raise InputError("--out is missing: name the file to write, or ask for --plan-only")
    if data is None and (stats is None or not stats.exists()):
        raise InputError("--data is missing: give a few hundred images, a folder, a .tar or hfds/NAME")
    from vitlr.anatomy import linears, visibility
    from vitlr.checkpoint import files, origins
    from vitlr.cli.models import Source, check_destinations, open_model, parse_device
    from vitlr.compression import compressed, read_options
    from vitlr.data.loader import open_data
    from vitlr.decomposition.spectra_file import place
    from vitlr.runtime import processes

    how: dict[str, Any] = {"rounds": rounds, "trials": trials, "rungs": refine, "stats": stats}
    images_as = taken(Preprocessing, options)
    timed = is_timed(budget)
    if timed and batch_size is not None:
        options["batch_size"] = batch_size
    read_options(budget, **how, changes=options)
    _check_refinement(refine, None if trials else resume, data, plan_only, options)
    if rounds > 1 and data is None:
        raise InputError(f"--rounds {rounds} needs images to measure again: add --data, or take one round")
    if resume is not None and resume.exists() and not resume.is_dir():
        raise InputError(f"--resume {resume} is a file, expected a folder")
    if trials and data is None:
        raise InputError(f"--trials {trials} needs images to try the plan on: add --data, or leave it out")
    inputs = {"--checkpoint": checkpoint, "--data": Path(data) if data else None, "--class-map": class_map}
    outputs = {"--out": out, "--stats": stats, "--plan-out": plan_out}
    outputs |= {} if stats is None else {"the spectra of --stats": place(stats)}
    check_destinations(outputs, {**inputs, "--resume": resume})
    source = Source(checkpoint, model_arguments(img_size, num_classes, model_kwargs), key=checkpoint_key)
    network = open_model(model, source, device=parse_device(device or ("cpu" if timed else None)))
    if out is not None:
        origins.check_origin(origins.find_origin(network, source.args))  # arguments a file cannot hold
    with visibility.visible(network):
        linears.targets(network, options.get("include"), options.get("exclude"))  # before images are looked for
    read: dict[str, Any] = {"class_map": class_map, "batch_size": batch_size or 64, "workers": workers, "limit": limit}
    read |= images_as
    images = None if data is None else open_data(data, network, **read)

    def decided(plan: Any) -> None:
        if plan.why:
            typer.echo(f"method {plan.method}: {in_flags(plan.why, flags_of(compress))}", err=True)
        if plan_out is not None and processes.first():
            plan.save(plan_out)

    done = compressed(
        network,
        images,
        budget,
        **how,
        **options,
        resume=resume,
        inplace=True,
        plan_only=plan_only,
        decided=decided,
        watch=lambda *stage: _watched(*stage, stats=stats, resume=resume),
    )
    if not processes.first():
        return Result({}, "")
    plan, text = done.plan, [str(done.plan)]
    rungs = [] if done.report is None else done.report.to_dict()["rungs"]
    size = plan.bytes_kept
    if out is not None and not plan_only:
        info: dict[str, Any] = done.model.vitlr_info  # type: ignore[assignment]
        name = info["recipe"]["data"] or (data and Path(os.path.normpath(data)).name)
        files.save(done.model, out, recipe={**info["recipe"], "data": name})
        size = out.stat().st_size
        text += [] if done.report is None else [str(done.report)]
        text += [f"wrote {out}: {size / 1e6:.3f} MB"]
    kept = {"params_kept": plan.params_kept, "macs": plan.macs, "macs_kept": plan.macs_kept, "bytes": size}
    values = {"out": None if plan_only else str(out), "params": plan.params, **kept, "rungs": rungs}
    values |= {} if plan.latency is None else {"latency": plan.latency.to_dict()}
    values |= {"seconds": round(time.perf_counter() - start, 3), "images": done.images}
    text += [] if images is None else [wrapped(images.made)]
    return Result(values, "\n".join([*text, f"{done.images} images, {values['seconds']:.1f} s"]))


def _check_refinement(
    refine: str, resume: Path | None, data: str | None, plan_only: bool, options: dict[str, Any]
) -> None:
    """Refuse what cannot be refined before anything is read."""
    rungs = parse_rungs(refine)
    for name in ("steps", "minutes"):
        if name in options and not rungs:
            raise InputError(f"--{name} goes with --refine rescale, refit, regrow or distil")
    if "lr" in options and "distil" not in rungs:
        raise InputError("--lr goes with --refine distil")
    if not rungs:
        if resume is not None:
            raise InputError("--resume goes with --trials, and --refine rescale, refit, regrow or distil")
        return
    if plan_only:
        raise InputError("--refine needs a model, and --plan-only makes none; leave one of them out")
    if data is None:
        raise InputError("--refine needs images: add --data (a folder of images, a .tar or hfds/NAME)")


@contextmanager
def _watched(
    label: str, total: int | None = None, unit: str = "images", *, stats: Path | None, resume: Path | None
) -> Iterator[Any]:
    """A bar for a stage, and what an interrupt of it is told."""
    from vitlr.runtime.progress import bar

    try:
        with bar(label, total, unit) as progress:
            if label.startswith("refining") or label == "trying":
                with resumable(resume):
                    yield progress
            else:
                yield progress
    except Interrupted:
        raise
    except KeyboardInterrupt as cause:
        if label == "calibrating" and stats is None:
            raise Interrupted("with --stats F the next run would go on where this one stopped") from cause
        raise
