"""Published methods against ours on the real ViT-Ti, without any training: one table, Markdown and JSON.

    python -m bench.compare.methods [--data FOLDER] [--budgets 90 80 70 60 50] [--methods ...] [--out docs/results]

One calibration over the calibration images serves every method. Each method gives spectra; each is then planned with
uniform ranks (every layer keeps the same share) and with our allocation (the knapsack over its own energies), applied,
and evaluated on images that calibration never saw. Statistics, decoded images and finished rows are kept in
bench/build under a digest of the code, so that an interrupted run goes on where it stopped but never mixes figures of
two versions; a tree that changes during a run gives no table. --fresh starts over.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.common import BUILD, CODE, ROOT, data_folder, machine, parser, sources, write_json
from bench.compare.tables import markdown
from bench.compare.vit_tiny import CHECKPOINT, MODEL, Kept, Recorded, calibration_tar, validation, weights_digest
from vitlr.calibration.loop import calibrate
from vitlr.calibration.options import EXTRAS, OBJECTIVES
from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint.creation import create_model
from vitlr.data.loader import open_data
from vitlr.decomposition.baselines import BASELINES
from vitlr.decomposition.solving import decompose
from vitlr.decomposition.spectra import Spectra
from vitlr.measuring.cost import count_params
from vitlr.measuring.evaluation import Metrics, evaluate
from vitlr.planning.planner import plan
from vitlr.surgery.application import apply

METHODS: dict[str, Callable[[nn.Module, Statistics], Spectra]] = {
    **BASELINES,
    **{f"vitlr-{o}": lambda model, stats, o=o: decompose(model, stats, o) for o in OBJECTIVES},
}
# At rank step 16 uniform ranks leave 4 points of a budget unspent, so all are compared at 1; 16 is plan's default.
ALLOCATIONS: dict[str, dict[str, Any]] = {
    "uniform": {"uniform": True, "rank_step": 1},
    "allocated": {"rank_step": 1},
    "allocated-16": {"rank_step": 16},
}


def row(
    method: str,
    allocation: str,
    budget: str,
    model: nn.Module,
    stats: Statistics,
    spectra: Spectra,
    loader: Kept,
    dense: Recorded,
) -> dict[str, Any]:
    """Plan, apply and evaluate one method under one budget."""
    start = time.perf_counter()
    chosen = plan(model, stats, budget, spectra=spectra, method="lowrank", **ALLOCATIONS[allocation])
    small = apply(model, chosen)
    seconds = time.perf_counter() - start
    dense.next = 0
    metrics = evaluate(small, loader, dense)
    return {
        "method": method,
        "allocation": allocation,
        "budget": budget,
        **metrics.to_dict(),
        "params": count_params(small),
        "params_kept": count_params(small) / chosen.params,
        "macs_kept": chosen.macs_kept / chosen.macs,
        "predicted_error": chosen.error,
        "ranks": chosen.ranks,
        "seconds": seconds,
    }


def statistics(model: nn.Module, folder: Path, cache: Path) -> tuple[Statistics, float]:
    """Everything that any method needs, in one pass over the calibration images; seconds it took (when it ran)."""
    path = cache / f"statistics-{ARGS.images}-{ARGS.samples}-{ARGS.seed}.safetensors"
    took = path.with_suffix(".seconds.json")
    if path.is_file() and took.is_file():
        return Statistics.load(path), json.loads(took.read_text())
    loader = open_data(calibration_tar(folder), model, batch_size=ARGS.batch_size, limit=ARGS.images)
    start = time.perf_counter()
    draws = {"samples": ARGS.samples, "seed": ARGS.seed}
    stats = calibrate(model, loader, objective=OBJECTIVES, extras=EXTRAS, progress=_say("calibrating"), **draws)
    seconds = time.perf_counter() - start
    stats.save(path)
    took.write_text(json.dumps(seconds))
    return stats, seconds


def _say(what: str) -> Callable[[int, int | None], None]:
    return lambda done, total: print(f"\r{what} {done}/{total}", end="\n" if done == total else "", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the table goes")
    args.add_argument(
        "--budgets", type=float, nargs="+", default=[90, 80, 70, 60, 50], help="percent of parameters kept"
    )
    args.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    args.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=list(ALLOCATIONS))
    args.add_argument("--images", type=int, default=1000, help="calibration images")
    args.add_argument("--limit", type=int, default=None, help="validation images (default: all)")
    args.add_argument("--batch-size", type=int, default=50)
    args.add_argument("--samples", type=int, default=3, help="targets drawn per image for the gradient moments")
    args.add_argument("--seed", type=int, default=0, help="of the targets drawn for the gradient moments")
    args.add_argument("--fresh", action="store_true", help="forget what earlier runs kept")
    return args.parse_args()


def main() -> None:
    torch.set_num_threads(ARGS.threads)
    folder = data_folder(ARGS.data)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT)
    cache = BUILD / "compare_methods" / f"{weights_digest(model)}-{CODE}"
    if ARGS.fresh:
        shutil.rmtree(cache, ignore_errors=True)
    finished = cache / f"rows-{ARGS.images}-{ARGS.samples}-{ARGS.seed}-{ARGS.limit or 'all'}"
    finished.mkdir(parents=True, exist_ok=True)
    stats, calibration_seconds = statistics(model, folder, cache)
    loader = validation(folder, model, cache / f"validation-{ARGS.limit or 'all'}.pt", ARGS.batch_size, ARGS.limit)
    dense = Recorded(model, loader)
    reference: Metrics = evaluate(dense, loader)
    print(f"dense: {reference}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for method in ARGS.methods:
        spectra, seconds = None, 0.0
        for budget, allocation in product((f"params:{b:g}%" for b in ARGS.budgets), ARGS.allocations):
            if allocation == "allocated-16" and method not in ("vitlr-loss", "vitlr-fisher"):
                continue  # what a user gets by default; the others are compared at equal steps
            path = finished / f"{method}-{allocation}-{budget.replace(':', '_')}.json"
            if not path.is_file():
                if spectra is None:
                    start = time.perf_counter()
                    spectra = METHODS[method](model, stats)
                    seconds = time.perf_counter() - start
                found = row(method, allocation, budget, model, stats, spectra, loader, dense)
                write_json(path, {**found, "decompose_seconds": seconds})
            rows.append(json.loads(path.read_text()))
            r = rows[-1]
            print(f"{method:<17} {allocation:<9} {budget:<11} top-1 {r['top1']:6.2f}  agreement {r['agreement']:6.2f}  "
                  f"KL {r['kl']:7.4f}  params {r['params_kept']:.2%}", file=sys.stderr)  # fmt: skip
    if sources() != CODE:
        sys.exit("the code changed while this ran: its figures may mix two versions, so no table is written; run again")
    body = {
        "model": MODEL,
        "weights": CHECKPOINT,
        "calibration_images": stats.images,
        "calibration_seconds": calibration_seconds,
        "validation_images": reference.images,
        "code": CODE,
        "samples": ARGS.samples,
        "seed": ARGS.seed,
        "machine": machine(),
        "dense": {**reference.to_dict(), "params": count_params(model)},
        "rows": rows,
    }
    write_json(ARGS.json or ARGS.out / "compare_methods.json", body)
    (ARGS.out / "compare_methods.md").write_text(markdown(body))
    print(markdown(body))


if __name__ == "__main__":
    ARGS = _arguments()
    main()
