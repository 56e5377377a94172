"""What decides the accuracy of a compressed ViT-Ti: one factor at a time around one base, several seeds.

    python -m bench.compare.ablation [--data FOLDER] [--budgets 90 80 70 60 50 40] [--seeds 3]
        [--rungs refit regrow distil all]

The base is the objective "loss", ranks allocated by the knapsack, all calibration images, no rung. Each variant
moves one choice: the objective, the allocation (uniform, widths, hybrid, joint), the number of images (64, 250), the
rung; "joint, fisher" and its numbers of images move two. A seed chooses which 150 of the 1000 calibration images judge,
which of the others are looked at, and the drawn targets: the intervals (95 %, Student's t over seeds) hold for all of
that. The validation images have no part in it; `--judge validation` takes them instead. Finished rows
are kept in bench/build, so that an interrupted run goes on where it stopped. `--only` runs some variants, `--keep`
leaves the table's rows that this run did not make; every row says of which code it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.common import BUILD, CODE, ROOT, data_folder, machine, parser, sources, write_json
from bench.compare.vit_tiny import CHECKPOINT, MODEL, Recorded, calibration_tar, validation, weights_digest
from vitlr import Statistics, apply, calibrate, create_model, evaluate, plan, refine
from vitlr.calibration.options import OBJECTIVES
from vitlr.data.loader import Loader, open_data
from vitlr.planning.options import METHODS, ROUNDED

HELD = 150
LADDERS: dict[str, Any] = {"refit": ["refit"], "regrow": ["regrow"], "distil": ["distil"], "all": "distil"}
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Variant:
    """A model to make; `images` None: all that do not judge."""

    name: str
    objective: str = "loss"
    method: str = "lowrank"
    uniform: bool = False
    images: int | None = None
    rung: str | None = None
    attention: str | None = None


BASE = Variant("loss, ranks, all images")
BOTH = Variant("joint, fisher", "fisher", "joint")
WHOLE = replace(BOTH, name="joint, fisher, queries and keys whole", attention="none")


def variants(rungs: Iterable[str], counts: Iterable[int]) -> list[Variant]:
    """The base and everything one step away from it; the joint allocation with the other objective."""
    found = [BASE]
    found += [replace(BASE, name=f"objective {o}", objective=o) for o in OBJECTIVES if o != BASE.objective]
    found += [replace(BASE, name="uniform ranks", uniform=True)]
    # Rounding changes bytes only, under budgets of its own: bench/compare/bits.py.
    methods = [method for method in METHODS if method not in (BASE.method, *ROUNDED)]
    found += [replace(BASE, name=f"allocation {m}", method=m) for m in methods]
    found += [BOTH, WHOLE]
    for of in (BASE, BOTH):
        start = "" if of is BASE else f"{of.name}, "
        found += [replace(of, name=f"{start}{count} images", images=count) for count in counts]
        found += [replace(of, name=f"{start}rung {rung}", rung=rung) for rung in rungs]
    return found


class Seed:
    """One split of the calibration images, with the statistics measured on parts of it."""

    def __init__(self, model: nn.Module, folder: Path, cache: Path, seed: int) -> None:
        self.model, self.cache, self.seed = model, cache, seed
        loader = open_data(
            calibration_tar(folder), model, class_map=folder / "imagenet_synsets.txt", batch_size=50, workers=0
        )
        order = torch.randperm(loader.images, generator=torch.Generator().manual_seed(seed)).tolist()
        self.loader, self.learn = loader, order[HELD:]
        if ARGS.judge == "validation":
            self.judge: Any = validation(folder, model, cache.parent / "validation.pt")
        else:
            self.judge = list(loader.subset(order[:HELD]))
        self.dense: Recorded | None = None
        self._stats: dict[int | None, Statistics] = {}

    def images(self, count: int | None) -> Loader:
        return self.loader.subset(self.learn[:count])

    def statistics(self, count: int | None) -> Statistics:
        if count not in self._stats:
            path = self.cache / f"statistics-{self.seed}-{count or 'all'}.safetensors"
            if not path.is_file():
                stats = calibrate(
                    self.model,
                    self.images(count),
                    objective=OBJECTIVES,
                    samples=ARGS.samples,
                    seed=self.seed,
                    hidden=True,
                )
                stats.save(path)
            self._stats[count] = Statistics.load(path)
        return self._stats[count]

    def row(self, variant: Variant, budget: str) -> dict[str, Any]:
        """Make the model of a variant, and judge it."""
        stats = self.statistics(variant.images)
        start = time.process_time()
        choices: dict[str, Any] = {"objective": variant.objective, "method": variant.method, "rank_step": 1}
        choices |= {"uniform": True} if variant.uniform else {}
        choices |= {"attention": variant.attention} if variant.attention else {}
        small = apply(self.model, plan(self.model, stats, budget, **choices))
        report = None
        if variant.rung is not None:
            ladder = LADDERS[variant.rung]
            small = refine(
                small, self.model, self.images(variant.images), rungs=ladder, steps=ARGS.steps, seed=self.seed
            )
            report = small.vitlr_refinement.to_dict()
        seconds = time.process_time() - start
        if self.dense is None:
            self.dense = Recorded(self.model, self.judge)
        self.dense.next = 0
        metrics = evaluate(small, self.judge, self.dense).to_dict()
        facts = {"variant": variant.name, "budget": budget, "seed": self.seed, "seconds": seconds, "code": CODE}
        return {**facts, **metrics, "refinement": report}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval over seeds; no width for one seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows and the old ones that they do not replace, in the order of the variants."""
    order = [v.name for v in variants(LADDERS, ARGS.images)]
    made = {(r["variant"], r["budget"], r["seed"]) for r in new}
    rows = [r for r in old if (r["variant"], r["budget"], r["seed"]) not in made] + new
    return sorted(rows, key=lambda r: order.index(r["variant"]) if r["variant"] in order else len(order))


def markdown(body: dict[str, Any]) -> str:
    """One table a measure, a line a variant."""
    rows, facts = body["rows"], body["machine"]
    budgets = sorted({r["budget"] for r in rows}, key=lambda b: -float(b.removeprefix("params:").rstrip("%")))
    judged = {"held": f"{HELD} calibration images that nothing else has seen", "validation": "1300 validation images"}
    lines = [
        "# What decides the accuracy: one factor at a time",
        "",
        f"`{body['model']}`, {body['seeds']} seeds (one where there is no interval), "
        f"{body['samples']} drawn targets an image, rank step 1, judged on "
        f"{judged[body['judge']]}; mean ± half the 95 % interval (Student's t over seeds, each with its own images). "
        f"Rungs: {body['steps']} steps where distil. {facts['processor']}, {facts['threads']} thread(s), torch "
        f"{facts['torch']}, {facts['date']}.",
        "",
        f"Made by `python -m bench.compare.ablation`, code {', '.join(sorted({r['code'] for r in rows}))}.",
    ]
    for key, title in (("top1", "top-1"), ("agreement", "agreement"), ("kl", "KL"), ("seconds", "processor seconds")):
        lines += ["", f"## {title}", "", f"| | {' | '.join(budgets)} |", f"|---{'|---' * len(budgets)}|"]
        for name in dict.fromkeys(r["variant"] for r in rows):
            cells = []
            for budget in budgets:
                found = [r[key] for r in rows if (r["variant"], r["budget"]) == (name, budget)]
                mean, half = interval(found) if found else (math.nan, math.nan)
                digits = 3 if key == "kl" else 1
                cells.append(
                    "" if not found else f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
                )
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(ARGS.threads)
    folder = data_folder(ARGS.data)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT)
    cache = BUILD / "ablate" / f"{weights_digest(model)}-{CODE}" / f"{ARGS.judge}-{ARGS.samples}-{ARGS.steps}"
    cache.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number in range(ARGS.seeds):
        seed: Seed | None = None
        wanted = [v for v in variants(ARGS.rungs, ARGS.images) if any(fnmatch(v.name, only) for only in ARGS.only)]
        for variant, percent in itertools.product(wanted, ARGS.budgets):
            if variant.rung is not None and percent not in ARGS.rung_budgets:
                continue
            budget = f"params:{percent:g}%"
            path = cache / f"{variant.name}-{percent:g}-{number}.json".replace(" ", "_").replace(":", "")
            if not path.is_file():
                seed = seed or Seed(model, folder, cache, number)
                write_json(path, seed.row(variant, budget))
            rows.append(json.loads(path.read_text()))
            r = rows[-1]
            print(
                f"seed {number} {variant.name:<40} {budget:<11} top-1 {r['top1']:6.2f} KL {r['kl']:.4f}",
                file=sys.stderr,
            )
    if sources() != CODE:
        sys.exit("the code changed while this ran: its figures may mix two versions, so no table is written; run again")
    facts = {key: getattr(ARGS, key) for key in ("seeds", "samples", "steps", "judge")}
    path = ARGS.json or ARGS.out / "ablate.json"
    if ARGS.keep and path.is_file():
        rows = merged(json.loads(path.read_text())["rows"], rows)
    body = {"model": MODEL, **facts, "code": CODE, "machine": machine(), "rows": rows}
    write_json(path, body)
    (ARGS.out / "ablate.md").write_text(markdown(body))
    print(markdown(body))


def _arguments() -> argparse.Namespace:
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the table goes")
    args.add_argument("--budgets", type=float, nargs="+", default=[90, 80, 70, 60, 50, 40], help="percent kept")
    args.add_argument("--seeds", type=int, default=3, choices=range(1, len(STUDENT) + 2), metavar="N")
    args.add_argument("--images", type=int, nargs="*", default=[64, 250], help="calibration images beside all of them")
    args.add_argument("--samples", type=int, default=3, help="targets drawn per image for the gradient moments")
    args.add_argument("--rungs", nargs="*", choices=LADDERS, default=list(LADDERS))
    args.add_argument("--rung-budgets", type=float, nargs="+", default=[80, 60], help="budgets at which rungs run")
    args.add_argument("--steps", type=int, default=100, help="of the rung distil")
    args.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="variants by name, as in *rung*")
    args.add_argument("--keep", action="store_true", help="leave the rows that are there and not made again")
    args.add_argument("--judge", choices=("held", "validation"), default="held")
    return args.parse_args()


if __name__ == "__main__":
    ARGS = _arguments()
    main()
