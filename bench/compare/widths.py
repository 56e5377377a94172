"""Widths, ranks and both on the real ViT-Ti, without any training: one table, Markdown and JSON.

    python -m bench.compare.widths [--data FOLDER] [--budgets 90 80 70 60 50] [--objective fisher] [--out docs/results]

One calibration with hidden moments serves every row. Validation images are for these figures only: ridge and scale of
the widths' losses were chosen on held-out calibration images (docs/method.md). Statistics, decoded images and finished
rows are kept in bench/build under a digest of the code, as `compare_methods` does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.common import BUILD, CODE, ROOT, data_folder, machine, parser, sources, write_json
from bench.compare.methods import CHECKPOINT, MODEL, Kept, Recorded
from vitlr.calibration.loop import calibrate
from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint.creation import create_model
from vitlr.compression import compressed
from vitlr.data.loader import open_data
from vitlr.decomposition.solving import decompose
from vitlr.decomposition.spectra import Spectra
from vitlr.errors import InputError
from vitlr.measuring.cost import count_params
from vitlr.measuring.evaluation import evaluate
from vitlr.planning.planner import plan
from vitlr.pruning import find_mlps, narrowed_mlps
from vitlr.runtime.places import atomic_path
from vitlr.surgery.application import apply

RANK_STEP, WIDTH_STEP = 1, 16
RATE = 0.3  # of the hidden neurons, for the hybrid as published: a lower rate for MLPs than the budget asks of the rest
METHODS: dict[str, dict[str, Any]] = {
    "prune-alone": {"method": "widths", "compensate": False},
    "prune": {"method": "widths"},
    "lowrank": {"method": "lowrank"},
    "hybrid-rate": {"method": "widths+ranks", "prune_rate": RATE},
    "hybrid": {"method": "widths+ranks"},
    "joint-scores-kept": {"method": "joint", "attention": "none"},
    "joint": {"method": "joint"},
    "joint-rounds": {"method": "joint"},
}
ROUNDS = {"joint-rounds": 2}
LABELS = {
    "prune-alone": "widths, nothing made up for",
    "prune": "widths, compensated",
    "lowrank": "ranks",
    "hybrid-rate": f"hybrid: {RATE:.0%} of the neurons, ranks for attention (2203.13444)",
    "hybrid": "hybrid: widths for MLPs, ranks for attention, one knapsack",
    "joint-scores-kept": "joint, queries and keys of full width",
    "joint": "**joint: widths and ranks for all, one knapsack**",
    "joint-rounds": "joint in two rounds, the second from moments of the narrowed network",
}


def row(
    name: str,
    budget: str,
    model: nn.Module,
    stats: Statistics,
    spectra: Spectra,
    loader: Kept,
    dense: Recorded,
    measure: Callable[[nn.Module], Statistics],
) -> tuple[dict[str, Any], Spectra]:
    """Plan, apply and evaluate one method under one budget; the spectra come back with the widths that were solved."""
    start = time.process_time()
    options = dict(METHODS[name])
    steps = {"rank_step": RANK_STEP} | ({"width_step": WIDTH_STEP} if name != "lowrank" else {})
    try:
        if name in ROUNDS:
            how: dict[str, Any] = {"rounds": ROUNDS[name], "objective": spectra.objective, **steps, **options}
            first = lambda network: stats if network is model else measure(network)  # noqa: E731
            done = compressed(model, None, budget, measure=first, **how)
            chosen, small = replace(done.plan, spectra=spectra), done.model
        else:
            chosen = plan(model, stats, budget, spectra=spectra, **steps, **options)
            small = apply(model, chosen)
    except InputError as cause:
        return {"method": name, "budget": budget, "refused": str(cause), "code": CODE}, spectra
    seconds = time.process_time() - start
    dense.next = 0
    found = {
        "method": name,
        "budget": budget,
        **evaluate(small, loader, dense).to_dict(),
        "params": count_params(small),
        "params_kept": count_params(small) / chosen.params,
        "macs_kept": chosen.macs_kept / chosen.macs,
        "predicted_error": chosen.error,
        "ranks": chosen.ranks,
        "widths": chosen.narrowed | {name: mlp.width for name, mlp in narrowed_mlps(small).items()},
        "cpu_seconds": seconds,
        "code": CODE,
    }
    return found, chosen.spectra or spectra


def measured(model: nn.Module, folder: Path, args: argparse.Namespace) -> Statistics:
    """Everything that any row needs, in one pass over the calibration images."""
    loader = open_data(folder / "imagenet_calibration_1000.tar", model, batch_size=args.batch_size, limit=args.images)
    return calibrate(model, loader, objective=args.objective, hidden=True, samples=args.samples, seed=args.seed)


def statistics(model: nn.Module, folder: Path, cache: Path, args: argparse.Namespace) -> Statistics:
    """Those of the dense model, of an earlier run where there was one."""
    path = args.stats or cache / f"statistics-{args.objective}-{args.images}-{args.samples}-{args.seed}.safetensors"
    if path.is_file():
        return Statistics.load(path)
    stats = measured(model, folder, args)
    stats.save(path)
    return stats


def recorded(model: nn.Module, loader: Kept, path: Path) -> Recorded:
    """The dense model's answers, which one process computes for all that share the cache."""
    if path.is_file():
        dense = Recorded(model, [])  # type: ignore[arg-type]
        dense.logits = torch.load(path, weights_only=True)
        return dense
    dense = Recorded(model, loader)
    with atomic_path(path) as temporary:
        torch.save(dense.logits, temporary)
    return dense


def markdown(body: dict[str, Any]) -> str:
    """All rows, as they stand in the docs."""
    dense, facts = body["dense"], body["machine"]
    lines = [
        "# Widths, ranks and both, without any training",
        "",
        f"`{body['model']}` ({body['weights']}), {body['calibration_images']} calibration images, {body['samples']} "
        f"drawn targets each; accuracy on the {body['validation_images']}-image subset of the ILSVRC2012 validation "
        "set (easier than the full set: do not read it as ImageNet accuracy). "
        f"Dense: top-1 {_interval(dense)}, {dense['params']:,} parameters. Intervals are 95 % (Wilson); all rows see "
        "the same images. Agreement: same first class as the dense model. KL(dense, small) in nats. Widths in steps of "
        f"{WIDTH_STEP}, ranks in steps of {RANK_STEP}. Objective: {body['objective']}.",
        "",
        f"{facts['processor']}, {facts['threads']} thread(s), torch {facts['torch']}, {facts['date']}; code "
        f"{', '.join(sorted({r['code'] for r in body['rows']}))}. "
        f"Made by `python -m bench.compare.widths --objective {body['objective']}`; "
        f"figures, ranks, widths in `{_name(body['objective'])}.json`.",
    ]
    for budget in dict.fromkeys(r["budget"] for r in body["rows"]):
        lines += ["", f"## {budget}", ""]
        lines += [
            "| method | top-1 (95 %) | top-5 | agreement | KL | kept | MACs kept | neurons kept | layers of low rank |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        lines += [_line(r, body) for r in body["rows"] if r["budget"] == budget]
    return "\n".join(lines) + "\n"


def _name(objective: str) -> str:
    return "compare_pruning" + ("" if objective == "loss" else f"_{objective}")


def _interval(r: dict[str, Any]) -> str:
    return f"{r['top1']:.2f} ({r['top1_low']:.1f} to {r['top1_high']:.1f})"


def _line(r: dict[str, Any], body: dict[str, Any]) -> str:
    if "refused" in r:
        return f"| {LABELS[r['method']]} | out of reach |" + " |" * 7
    full = body["full_widths"]
    kept = sum(r["widths"].get(name, width) for name, width in full.items()) / sum(full.values())
    cells = [
        LABELS[r["method"]],
        _interval(r),
        f"{r['top5']:.2f}",
        f"{r['agreement']:.2f}",
        f"{r['kl']:.3f}",
        f"{r['params_kept']:.1%}",
        f"{r['macs_kept']:.1%}",
        f"{kept:.1%}",
        f"{len(r['ranks'])}",
    ]
    return f"| {' | '.join(cells)} |"


def _arguments() -> argparse.Namespace:
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the table goes")
    args.add_argument("--budgets", type=float, nargs="+", default=[90, 80, 70, 60, 50], help="percent kept")
    args.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    args.add_argument("--objective", choices=("loss", "fisher", "output"), default="loss")
    args.add_argument("--stats", type=Path, help="statistics of an earlier run")
    args.add_argument("--images", type=int, default=1000, help="calibration images")
    args.add_argument("--limit", type=int, default=None, help="validation images (default: all)")
    args.add_argument("--batch-size", type=int, default=50)
    args.add_argument("--samples", type=int, default=3, help="targets drawn per image for the gradient moments")
    args.add_argument("--seed", type=int, default=0, help="of the targets drawn for the gradient moments")
    return args.parse_args()


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder = data_folder(args.data)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT)
    cache = BUILD / "compare_pruning" / CODE
    finished = cache / f"rows-{args.objective}-{args.images}-{args.samples}-{args.seed}-{args.limit or 'all'}"
    finished.mkdir(parents=True, exist_ok=True)
    stats = statistics(model, folder, cache, args)
    tar, synsets = folder / "imagenet_validation_1300.tar", folder / "imagenet_synsets.txt"

    def images() -> Any:
        return open_data(tar, model, class_map=synsets, batch_size=args.batch_size, limit=args.limit, need_labels=True)

    loader = Kept.load(cache / f"validation-{args.limit or 'all'}.pt", images, model)
    dense = recorded(model, loader, cache / f"dense-{args.limit or 'all'}.pt")
    reference = evaluate(dense, loader)
    print(f"dense: {reference}", file=sys.stderr)
    spectra, rows = decompose(model, stats, args.objective), []
    for budget in (f"params:{b:g}%" for b in args.budgets):
        for name in args.methods:
            path = finished / f"{name}-{budget.replace(':', '_')}.json"
            if not path.is_file():
                again = partial(measured, folder=folder, args=args)
                found, spectra = row(name, budget, model, stats, spectra, loader, dense, again)
                write_json(path, found)
            rows.append(r := json.loads(path.read_text()))
            said = r.get("refused") or f"top-1 {r['top1']:6.2f}  agreement {r['agreement']:6.2f}  KL {r['kl']:7.4f}"
            print(f"{name:<12} {budget:<11} {said}", file=sys.stderr)
    if sources() != CODE:
        sys.exit("the code changed while this ran: its figures may mix two versions, so no table is written; run again")
    body = {
        "model": MODEL,
        "weights": CHECKPOINT,
        "calibration_images": stats.images,
        "validation_images": reference.images,
        "code": CODE,
        "objective": args.objective,
        "samples": stats.samples,
        "seed": args.seed,
        "machine": machine(),
        "full_widths": {name: mlp.width for name, mlp in find_mlps(model).items()},
        "dense": {**reference.to_dict(), "params": count_params(model)},
        "rows": rows,
    }
    write_json(args.json or args.out / f"{_name(args.objective)}.json", body)
    (args.out / f"{_name(args.objective)}.md").write_text(markdown(body))
    print(markdown(body))


if __name__ == "__main__":
    main(_arguments())
