"""The papers' DeiT-B tables, on a machine with ImageNet: one command from the dense model to the comparison.

    python -m bench.trained.imagenet --train /data/imagenet/train --val /data/imagenet/val --device cuda --workers 16

Calibrates on some training images without their labels, plans every budget, refines, validates on all validation
images, and sets the result beside what the papers report. Images lie in a folder a class, in a .tar of such folders,
or in `hfds/NAME`; `--class-map` (a line a class) is needed where folder names in order are not the model's classes.
Weights come from the hub or from --checkpoint. Statistics, snapshots of the refinement and finished rows lie in --work,
so that an interrupted run, started again, goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.common import BUILD, CODE, ROOT, machine, parser, sources, write_json
from vitlr import InputError, Statistics, apply, calibrate, create_model, evaluate, load, plan, refine, save
from vitlr.calibration.options import DEFAULT, OBJECTIVES
from vitlr.data.loader import Loader, open_data
from vitlr.measuring.cost import count_params
from vitlr.refinement.recipe import Recipe, parse_rungs
from vitlr.runtime.progress import bar


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure of a paper: what is kept of the parameters, top-1, and what it took."""

    model: str
    method: str
    kept: float
    top1: float
    took: str


# ImageNet-1k, all 50,000 validation images; the 44 M rows are those of FLAR-SVD's table (CVPRW 2025).
PUBLISHED = (
    Published("deit_base", "dense (arXiv 2012.12877)", 1.0, 81.80, ""),
    Published("deit_base", "AFM (AAAI 2023)", 0.67, 81.57, "few images"),
    Published("deit_base", "plain SVD", 0.51, 61.0, "no training"),
    Published("deit_base", "SVD-LLM (arXiv 2403.07378)", 0.51, 70.4, "no training"),
    Published("deit_base", "ASVD (arXiv 2312.05821)", 0.51, 71.8, "no training"),
    Published("deit_base", "FWSVD (arXiv 2207.00112)", 0.51, 73.6, "no training"),
    Published("deit_base", "FLAR-SVD", 0.51, 78.4, "no training"),
    Published("deit_base", "FLAR-SVD", 0.51, 81.0, "one epoch with labels"),
    Published("deit_base", "Azizi et al. (arXiv 2402.06004)", 0.40, 81.10, "learnt residuals"),
    Published("deit_base", "ComCAT", 0.39, 82.28, "trained with labels"),
)


class Run:
    """One model, its images, and the rows that are done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        weights = {"checkpoint": args.checkpoint, "pretrained": args.checkpoint is None}
        self.model = create_model(args.model, **weights, **args.model_kwargs).to(self.device)
        for path in (args.train, args.val):  # what is missing is said before hours of work
            self.open(path, limit=1)
        choices = {k: str(v) for k, v in vars(args).items() if k not in ("budgets", "refine", "out", "json", "workers")}
        key = hashlib.sha256(json.dumps([choices, CODE], sort_keys=True).encode()).hexdigest()[:12]
        self.work = args.work / f"{args.model}-{key}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []

    def open(self, path: str, labels: bool = False, limit: int | None = None) -> Loader:
        choices = {"batch_size": self.args.batch_size, "workers": self.args.workers, "need_labels": labels}
        return open_data(path, self.model, class_map=self.args.class_map, limit=limit, **choices)

    def proxy(self) -> Loader:
        """The training images that may be looked at, the same at every call."""
        return self.open(self.args.train, limit=self.args.images)

    def statistics(self) -> Statistics:
        path = self.work / "statistics.safetensors"
        if not path.is_file():
            loader = self.proxy()
            with bar("calibrating", loader.images) as progress:
                choices = {key: getattr(self.args, key) for key in ("objective", "samples", "seed")}
                stats = calibrate(self.model, loader, hidden=False, **choices, progress=progress)
            stats.save(path)
        return Statistics.load(path)

    def validate(self, name: str, model: nn.Module, **facts: Any) -> dict[str, Any]:
        path = self.work / f"{name}.json"
        if not path.is_file():
            loader = self.open(self.args.val, labels=True, limit=self.args.limit)
            reference = None if model is self.model else self.model
            with bar(f"validating {name}", loader.images) as progress:
                metrics = evaluate(model, loader, reference, progress=progress)
            params = count_params(model)
            write_json(path, {"name": name, **facts, "params": params, **metrics.to_dict()})
        self.rows.append(json.loads(path.read_text()))
        print(f"{name}: top-1 {self.rows[-1]['top1']:.2f}", file=sys.stderr)
        return self.rows[-1]

    def budget(self, budget: str) -> None:
        """One budget: compressed without training, then by every ladder asked for."""
        stats = self.statistics()
        start = time.perf_counter()
        chosen = plan(self.model, stats, budget, method="lowrank", rank_step=self.args.rank_step)
        small = apply(self.model, chosen)
        seconds = time.perf_counter() - start
        name = budget.replace(":", "-").replace("%", "")
        for rungs in ("none", *self.args.refine):
            if rungs == "none":
                self.validate(name, small, budget=budget, rungs=[], seconds=seconds, steps=0)
                continue
            path = self.work / f"{name}-{rungs}.safetensors"
            ladder = [rungs.removeprefix("only-")] if rungs.startswith("only-") else rungs
            if not path.is_file():
                with bar(f"refining {budget}, {rungs}", unit="steps") as progress:
                    refined = refine(
                        small,
                        self.model,
                        self.proxy(),
                        rungs=ladder,
                        resume=self.work / f"{name}-{rungs}",
                        progress=progress,
                        **self.args.recipe,
                    )
                save(refined, path, plan=chosen)
            refined = load(path, device=self.device)
            report = refined.vitlr_info["recipe"]["refinement"]["rungs"]
            facts = {"rungs": report, "steps": sum(r["steps"] for r in report)}
            took = seconds + sum(r["seconds"] for r in report)
            self.validate(f"{name}-{rungs}", refined, budget=budget, seconds=took, **facts)


def markdown(body: dict[str, Any]) -> str:
    """Ours, then the papers' figures for the same model."""
    dense, facts = body["rows"][0], body["machine"]
    images = f"{body['images']} training images without labels, {body['samples']} drawn target(s) each"
    lines = [
        f"# {body['model']} on ImageNet-1k",
        "",
        f"{images}; objective {body['objective']}, seed {body['seed']}, rank step {body['rank_step']}; "
        f"top-1 over {dense['images']} validation "
        f"images, intervals 95 % (Wilson). torch {facts['torch']}, {body['device']}, {facts['date']}, code "
        f"{body['code']}. Seconds are those of planning and refining; calibration is shared by all rows.",
        "",
        "| budget | rungs kept | parameters | kept | top-1 (95 %) | against dense | steps | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in body["rows"]:
        kept = ", ".join(rung["name"] for rung in r.get("rungs", []) if rung["kept"]) or "none"
        interval = f"{r['top1']:.2f} ({r['top1_low']:.2f} to {r['top1_high']:.2f})"
        cells = [r.get("budget", "dense"), kept if "budget" in r else "", f"{r['params']:,}"]
        cells += [f"{r['params'] / dense['params']:.1%}", interval, f"{r['top1'] - dense['top1']:+.2f}"]
        cells += [str(r.get("steps", "")), f"{r['seconds']:.0f}" if "seconds" in r else ""]
        lines.append(f"| {' | '.join(cells)} |")
    published = [p for p in PUBLISHED if body["model"].startswith(p.model)]
    if published:
        lines += ["", "## Published, same model, all 50,000 validation images", ""]
        lines += ["| method | kept | top-1 | took |", "|---|---|---|---|"]
        lines += [f"| {p.method} | {p.kept:.0%} | {p.top1:.2f} | {p.took} |" for p in published]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    for rungs in args.refine:
        parse_rungs(rungs.removeprefix("only-"))
    Recipe.of(**args.recipe)
    run = Run(args)
    run.validate("dense", run.model)
    for budget in args.budgets:
        run.budget(budget)
    if sources() != CODE:
        sys.exit("the code changed while this ran: its figures may mix two versions, so no table is written; run again")
    facts = {key: getattr(args, key) for key in ("model", "images", "objective", "samples", "seed", "rank_step")}
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else machine()["processor"]
    body = {**facts, "recipe": args.recipe, "device": device, "code": CODE, "machine": machine(), "rows": run.rows}
    write_json(args.json or args.out / f"imagenet_{args.model}.json", body)
    (args.out / f"imagenet_{args.model}.md").write_text(markdown(body))
    print(markdown(body))


def _value(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError as cause:
        raise InputError(f"{text!r} cannot be read; expected KEY=JSON, such as crop=0.3") from cause


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    args = parser(__doc__ or "")
    args.add_argument("--train", required=True, help="training images; their labels are not used")
    args.add_argument("--val", required=True, help="validation images, with labels")
    args.add_argument("--class-map", type=Path, help="folder names in the model's class order, one a line")
    args.add_argument("--model", default="deit_base_patch16_224", help="a timm name")
    args.add_argument("--checkpoint", type=Path, help="weights (default: timm's pretrained ones)")
    args.add_argument("--model-kwargs", nargs="*", type=_value, default=[], metavar="KEY=JSON", help="for timm")
    args.add_argument("--budgets", nargs="+", default=["params:67%", "params:51%", "params:40%"], help="what is kept")
    args.add_argument(
        "--refine",
        nargs="*",
        default=["distil"],
        metavar="RUNG",
        help="refit, regrow, distil (all up to it), only-RUNG",
    )
    args.add_argument("--images", type=int, default=4096, help="training images to look at")
    args.add_argument("--objective", choices=OBJECTIVES, default=DEFAULT, help="what calibration measures")
    args.add_argument("--samples", type=int, default=3, help="targets drawn per image for the gradient moments")
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--rank-step", type=int, default=8)
    args.add_argument(
        "--recipe",
        nargs="*",
        type=_value,
        default=[],
        metavar="KEY=JSON",
        help="of vitlr.refine: steps, minutes, lr ...",
    )
    args.add_argument("--limit", type=int, help="validation images (default: all)")
    args.add_argument("--batch-size", type=int, default=64)
    args.add_argument("--workers", type=int, default=None)
    args.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args.add_argument("--work", type=Path, default=BUILD / "imagenet", help="statistics, snapshots and finished rows")
    args.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the table goes")
    found = args.parse_args(argv)
    found.model_kwargs, found.recipe = dict(found.model_kwargs), dict(found.recipe)
    return found


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
