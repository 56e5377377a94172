"""Refinement of the real ViT-Ti: every rung alone and all together, before and after, on images nobody learnt from.

    python -m bench.compare.refinement [--data FOLDER] [--budgets 80 60] [--method joint] [--ladders joint]
        [--minutes 60]

One calibration serves every budget. The 1300 validation images are looked at once per model, for the table; what is
kept and when to stop is decided on held-out calibration images. Statistics and snapshots are kept in bench/build, so
that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench.common import BUILD, CODE, data_folder, finish, parser
from bench.compare.vit_tiny import CHECKPOINT, MODEL
from vitlr import InputError, Statistics, apply, calibrate, create_model, evaluate, plan, refine, save
from vitlr.calibration.options import DEFAULT, OBJECTIVES
from vitlr.data.loader import open_data
from vitlr.planning.options import METHODS
from vitlr.runtime.progress import bar

LADDERS = {"refit": ["refit"], "regrow": ["regrow"], "distil": ["distil"], "all": "distil"}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder = data_folder(args.data)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT)
    cache = BUILD / "refine" / CODE
    cache.mkdir(parents=True, exist_ok=True)
    images = open_data(folder / "imagenet_calibration_1000.tar", model, batch_size=50, workers=args.workers)
    validation = open_data(
        folder / "imagenet_validation_1300.tar",
        model,
        class_map=folder / "imagenet_synsets.txt",
        batch_size=50,
        need_labels=True,
    )
    path = args.stats or cache / f"statistics-{args.objective}-{args.samples}.safetensors"
    if path.is_file():
        stats = Statistics.load(path)
    else:
        with bar("calibrating", images.images) as progress:
            stats = calibrate(
                model, images, objective=args.objective, samples=args.samples, hidden=True, progress=progress
            )
        stats.save(path)
    calibration = {"images": stats.images, "objectives": stats.objectives, "samples": stats.samples}
    rows: list[dict[str, Any]] = []
    for budget in args.budgets:
        chosen = plan(model, stats, f"params:{budget:g}%", objective=args.objective, rank_step=1, method=args.method)
        small = apply(model, chosen)
        before = evaluate(small, validation, model)
        print(f"{chosen.budget}: {before}", flush=True)
        for ladder in args.ladders:
            name = f"{args.method}-{budget:g}-{ladder}-{args.seed}"
            options = {key: getattr(args, key) for key in ("minutes", "steps", "lr", "seed") if getattr(args, key)}
            options |= dict(args.choice)
            with bar(f"{chosen.budget} {ladder}", unit="steps") as progress:
                refined = refine(
                    small,
                    model,
                    images,
                    rungs=LADDERS[ladder],
                    resume=cache / name,
                    progress=progress,
                    **options,
                )
            after = evaluate(refined, validation, model)
            print(f"{refined.vitlr_refinement}\n{ladder}: {after}", flush=True)
            save(refined, cache / f"{name}.safetensors", plan=chosen)
            found = {"budget": chosen.budget, "method": args.method, "objective": chosen.objective}
            found |= {"ladder": ladder, "options": options}
            found |= {"calibration": calibration, "before": before.to_dict(), "after": after.to_dict()}
            rows.append({**found, "refinement": refined.vitlr_refinement.to_dict()})
    finish("refine", {"rows": rows}, args.json)


def choice(text: str) -> tuple[str, Any]:
    """One option of the recipe, `KEY=JSON`."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError as cause:
        raise InputError(f"--choice {text!r} cannot be read; expected KEY=JSON, such as crop=0.3") from cause


def _arguments() -> argparse.Namespace:
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--stats", type=Path, help="statistics of an earlier run")
    args.add_argument("--budgets", type=float, nargs="+", default=[80, 60], help="percent of parameters kept")
    args.add_argument("--ladders", nargs="+", choices=LADDERS, default=list(LADDERS))
    args.add_argument(
        "--method", choices=[m for m in METHODS if m != "bits"], default="lowrank", help="ranks, hidden widths, or both"
    )
    args.add_argument("--objective", choices=OBJECTIVES, default=DEFAULT, help="what calibration measures")
    args.add_argument("--samples", type=int, default=3, help="targets drawn per image for the gradient moments")
    args.add_argument("--minutes", type=float, help="for all rungs together")
    args.add_argument("--steps", type=int, help="of the rung distil")
    args.add_argument("--lr", type=float)
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--workers", type=int, default=0, help="processes that decode images")
    args.add_argument("--choice", nargs="*", default=[], type=choice, metavar="KEY=JSON", help="more of the recipe")
    return args.parse_args()


if __name__ == "__main__":
    main(_arguments())
