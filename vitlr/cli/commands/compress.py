"""`vitlr compress`: calibrate, plan, apply and save, with everything that can be refused refused first."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
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
    ImgSize,
    Limit,
    Model,
    ModelKwargs,
    NumClasses,
    Workers,
    model_arguments,
)
from vitlr.cli.result import Result
from vitlr.errors import InputError
from vitlr.surgery import application


def compress(
    model: Model,
    budget: Annotated[
        str, typer.Option(metavar="Q:N", help="What is KEPT of the whole model: params:40%, macs:1.2G, bytes:10MB.")
    ],
    checkpoint: Checkpoint = None,
    data: Data = None,
    class_map: ClassMap = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="F", help="The compressed model.")] = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            metavar="F", help="Statistics: used if there, written otherwise; a run cut short goes on from them."
        ),
    ] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Show the plan, write no model.")] = False,
    plan_out: Annotated[Path | None, typer.Option(metavar="F", help="Write the plan as JSON.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="fisher, loss, output or normalized. [default: that of --stats, or fisher]"),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="lowrank: ranks. widths: hidden widths of MLPs. widths+ranks: widths for MLPs, ranks for all else. "
            "joint: both for all.",
        ),
    ] = "lowrank",
    prune_rate: Annotated[
        float | None, typer.Option(metavar="X", help="With widths+ranks: the share of hidden neurons to remove.")
    ] = None,
    prune_attention: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="With widths or joint, what attention may lose: query_keys (directions of queries and keys; joint "
            "does so by default), channels of its values, heads, or none.",
        ),
    ] = None,
    width_step: Annotated[int, typer.Option(metavar="N", min=1, help="Widths are multiples of N.")] = 16,
    uniform: Annotated[bool, typer.Option("--uniform", help="Give every layer the same share.")] = False,
    rank_step: Annotated[int, typer.Option(metavar="N", min=1, help="Ranks are multiples of N.")] = 16,
    min_rank: Annotated[int, typer.Option(metavar="N", min=1, help="The smallest rank.")] = 1,
    rank_buckets: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="At most N different ranks for one position in the blocks.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Only layers whose name matches; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="No layers whose name matches; may be repeated.")
    ] = None,
    centred: Annotated[bool, typer.Option("--centred", help="Project deviations from the mean only.")] = False,
    samples: Annotated[int | None, typer.Option(metavar="N", min=1, help="Draws for each image. [default: 1]")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Seed of these draws. [default: 0]")] = None,
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="With widths or joint: narrow MLPs part of the way, measure again, go on. Each costs a calibration.",
        ),
    ] = 1,
    refine: Annotated[
        str, typer.Option(metavar="RUNG", help="Repair the error afterwards, up to: none, refit, residual or joint.")
    ] = "none",
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep snapshots of the refinement there, and go on from them."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Steps of the joint rung. [default: 1000]")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="T", help="Time for the joint rung, instead of --steps.")
    ] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Its peak learning rate. [default: 0.0001]")] = None,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    workers: Workers = None,
    device: Device = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    as_json: AsJson = False,
) -> Result:
    """Compress a trained model to a budget, from a few hundred images without labels."""
    start = time.perf_counter()
    from vitlr.anatomy import linears
    from vitlr.calibration.options import DEFAULT
    from vitlr.checkpoint import files as checkpoint_file
    from vitlr.checkpoint import origins
    from vitlr.cli.destinations import check_destinations
    from vitlr.cli.models import Source, open_model, parse_device
    from vitlr.cli.refinement import RefineRequest
    from vitlr.cli.statistics import Request, exactly, statistics_for
    from vitlr.planning import planner
    from vitlr.planning.budgets import parse_budget
    from vitlr.planning.options import Planning
    from vitlr.rounds import check_rounds, narrowed, of_the_whole
    from vitlr.runtime.progress import bar

    wanted = parse_budget(budget)
    given = objective or (DEFAULT if stats is None or not stats.exists() else None)  # else that of the statistics
    _check_choices(given, uniform, rank_buckets, centred)
    planning = Planning(
        objective=given,
        method=method,
        prune_rate=prune_rate,
        attention=prune_attention,
        width_step=width_step,
        uniform=uniform,
        rank_step=rank_step,
        min_rank=min_rank,
        rank_buckets=rank_buckets,
        centred=centred,
    )
    planning.check_budget(wanted)
    check_rounds(rounds, str(planning.method), wanted)
    if rounds > 1 and (data is None or plan_out is not None):
        missing = "--plan-out, as the plan is of the narrowed model" if plan_out is not None else "no --data to measure"
        raise InputError(f"--rounds {rounds} does not go with {missing}; leave it out, or take one round")
    refinement = RefineRequest(refine, resume, steps, minutes, lr, seed)
    refinement.check(data, plan_only)
    inputs = {"--checkpoint": checkpoint, "--data": Path(data) if data else None, "--class-map": class_map}
    if out is None and not plan_only:
        raise InputError("--out is missing: name the file to write, or ask for --plan-only")
    check_destinations({"--out": out, "--stats": stats, "--plan-out": plan_out}, inputs)
    source = Source(checkpoint, model_arguments(img_size, num_classes, model_kwargs))
    network = open_model(model, source, device=parse_device(device))
    if out is not None:
        origins.check_origin(origins.find_origin(network, source.args))  # arguments a file cannot hold
    layers = tuple(linears.targets(network, include or None, exclude or None))
    hidden = planning.hidden
    request = Request(data, class_map, limit, batch_size, workers, objective, samples, seed, layers, stats, hidden)
    measured = statistics_for(network, request)
    images = measured.images
    whole = planner.sizes(network, measured).total
    reference = copy.deepcopy(network) if refinement.rungs else network
    left = wanted
    if rounds > 1:
        # As the first round was: its statistics may be of another objective or more draws than are the default.
        same = objective or measured.default_objective
        again = replace(request, path=None, objective=same, samples=measured.samples, seed=measured.seed)
        options = {"objective": objective, "width_step": width_step, "include": exactly(layers)}
        network, measured, left = narrowed(
            network, measured, wanted, rounds, lambda model: statistics_for(model, again), inplace=True, **options
        )

    with bar("solving", len(measured.layers), "layers") as progress:
        plan = planner.plan(
            network,
            measured,
            left,
            options=planning,
            progress=progress,
            include=exactly(layers) if len(layers) < len(measured.layers) else None,
        )
    plan = of_the_whole(plan, wanted, whole)
    if plan_out is not None:
        plan.save(plan_out)
    values: dict[str, Any] = {
        "out": None,
        "params": plan.params,
        "params_kept": plan.params_kept,
        "macs": plan.macs,
        "macs_kept": plan.macs_kept,
        "bytes": plan.bytes_kept,
        "rungs": [],
    }
    text = str(plan)
    if not plan_only:
        assert out is not None
        small = application.apply(network, plan, inplace=True)
        report = refinement.run(small, reference, request) if plan.changes or rounds > 1 else None
        recipe: dict[str, Any] = {
            "budget": plan.budget,
            "objective": plan.objective,
            "method": plan.method,
            "centred": plan.centred,
            "rounds": rounds,
            "images": images,
            "samples": measured.samples,
            "seed": measured.seed,
            "data": measured.notes.get("data"),
        }
        if report is not None:
            recipe["refinement"] = report.to_dict()
            values["rungs"] = recipe["refinement"]["rungs"]
            text += f"\n{report}"
        checkpoint_file.save(small, out, plan=plan, recipe=recipe)
        values |= {"out": str(out), "bytes": out.stat().st_size}
        text += f"\nwrote {out}: {values['bytes'] / 1e6:.3f} MB"
    values |= {"seconds": round(time.perf_counter() - start, 3), "images": images}
    return Result(values, f"{text}\n{images} images, {values['seconds']:.1f} s")


def _check_choices(objective: str | None, uniform: bool, rank_buckets: int | None, centred: bool) -> None:
    """What the stages would refuse too, but only after the images have been read."""
    from vitlr.calibration.options import OBJECTIVES

    if objective is not None and objective not in OBJECTIVES:
        raise InputError(f"--objective {objective!r} is unknown, expected one of {', '.join(OBJECTIVES)}")
    if uniform and rank_buckets is not None:
        raise InputError("--uniform gives one rank a shape already; it does not go with --rank-buckets")
    if centred and objective in ("normalized", "fisher"):
        raise InputError(
            f"--centred needs plain moments; it does not go with --objective {objective}, but with loss or output"
        )
