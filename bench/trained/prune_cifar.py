"""Pruning by learnt gates, low rank, their hybrid and the joint budget on CIFAR-10, before and after fine-tuning.

    python -m bench.trained.prune_cifar [--data FOLDER] [--arms ...] [--fewer 50 44 60] [--seeds 0 1 2]
    python -m bench.trained.prune_cifar --speed 50 --threads 1
    python -m bench.trained.prune_cifar --report

A ViT is trained for ten epochs, and everything then made of it gets two more, the dense model too: `low_rank` and
`joint` two of fine-tuning, `vtp` and `hybrid` one of their gates and one of fine-tuning. `narrow` is a smaller ViT that
is trained for all twelve from nothing: what a budget of its size could have had otherwise. Every row of the table is a
JSON file in bench/build/prune_cifar, every training keeps snapshots there, so an interrupted run goes on where it
stopped. The test images are looked at for the table only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.common import BUILD, ROOT, machine, parser, write_json
from bench.trained.cifar import AFTERWARDS, BATCH_SIZE, FROM_NOTHING, SHAPE, Cifar, accuracy, find_archive, vit
from bench.trained.tables import markdown
from vitlr import apply, calibrate, fuse, load, plan, save
from vitlr.measuring import cost
from vitlr.measuring.timing import throughput
from vitlr.runtime.contexts import amp_pays
from vitlr.training import TrainReport, train

CACHE = BUILD / "prune_cifar"
RESULTS = ROOT / "bench" / "results" / "prune_cifar.json"
TABLE = ROOT / "docs" / "results" / "prune_cifar.md"
NARROW = 96  # its ViT has 44 % fewer parameters
CALIBRATION_IMAGES = 1000
L1 = 1e-4
STEP = 4  # of ranks and widths
REPEATS = 30  # of every timing


class Run:
    """One seed: its dense model, its training images, and where its snapshots are."""

    def __init__(self, archive: Path, seed: int) -> None:
        self.archive, self.seed = archive, seed
        self.images = Cifar(archive, "train", training=True)
        self.folder = CACHE / f"seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def trained(self, width: int = 128) -> nn.Module:
        """The ViT after its ten epochs, trained from nothing by the seed where it is not there yet."""
        path = self.folder / f"vit{width}.safetensors"
        if not path.exists():
            torch.manual_seed(self.seed)
            model = vit(width)
            self.train(model, FROM_NOTHING, f"vit{width}")
            save(model, path)
        return load(path)

    def train(self, model: nn.Module, recipe: Any, name: str) -> TrainReport:
        """Train in place, with snapshots under `name`."""
        return train(model, self.images, replace(recipe, seed=self.seed), resume=self.folder / name)

    def calibrated(self, model: nn.Module) -> Any:
        """Moments over a thousand training images, as they are in use."""
        return calibrate(model, Cifar(self.archive, "train", limit=CALIBRATION_IMAGES), hidden=True)


def low_rank(run: Run, kept: str) -> tuple[nn.Module, int]:
    model = run.trained()
    return apply(model, plan(model, run.calibrated(model), kept, method="lowrank", rank_step=STEP)), 0


def joint(run: Run, kept: str) -> tuple[nn.Module, int]:
    model = run.trained()
    chosen = plan(model, run.calibrated(model), kept, rank_step=STEP, width_step=STEP, method="joint")
    return apply(model, chosen), 0


def vtp(run: Run, kept: str) -> tuple[nn.Module, int]:
    from vitlr.pruning.gated import prune

    recipe = replace(AFTERWARDS, epochs=1, seed=run.seed)
    small = prune(
        run.trained(), run.images, budget=kept, l1=L1, tile=1, recipe=recipe, finetune=False, resume=run.folder / "vtp"
    )
    return small, 1


def hybrid(run: Run, kept: str) -> tuple[nn.Module, int]:
    from vitlr.pruning.hybrids import hybrid as published

    model = run.trained()
    recipe = replace(AFTERWARDS, epochs=1, seed=run.seed)
    small = published(
        model,
        run.images,
        budget=kept,
        stats=run.calibrated(model),
        rank_step=STEP,
        l1=L1,
        tile=1,
        recipe=recipe,
        finetune=False,
        resume=run.folder / "hybrid",
    )
    return small, 1


# Each makes a smaller model that keeps "params:50%", and says how many of the two epochs that took.
ARMS: dict[str, Callable[[Run, str], tuple[nn.Module, int]]] = {
    "vtp": vtp,
    "low_rank": low_rank,
    "hybrid": hybrid,
    "joint": joint,
}
WHOLE: dict[str, int] = {"dense": 128, "narrow": NARROW}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    if args.speed is not None:
        write_json(CACHE / "speed" / "speed.json", _speed(args.speed))
    elif not args.report:
        archive = find_archive(args.data)
        for fewer in args.fewer:
            for seed in args.seeds:
                for arm in args.arms:
                    _row(archive, arm, seed, None if arm in WHOLE else fewer)
    rows = [json.loads(path.read_text()) for path in sorted(CACHE.glob("*.json"))]
    body = {
        "recipe": FROM_NOTHING.to_dict(),
        "afterwards": AFTERWARDS.to_dict(),
        "l1": L1,
        "calibration_images": CALIBRATION_IMAGES,
        "amp": amp_pays(torch.device("cpu")),
        "machine": machine(),
        "speed": json.loads((CACHE / "speed" / "speed.json").read_text()) if (CACHE / "speed").exists() else None,
        "notes": args.note,
        "rows": rows,
    }
    text = markdown(body)
    print(text, flush=True)
    if args.report:
        write_json(RESULTS, body)
        TABLE.write_text(text)


def _row(archive: Path, arm: str, seed: int, fewer: float | None) -> None:
    """One row of the table, unless it is there."""
    name = f"{arm}-{seed}" if fewer is None else f"{arm}-{fewer:g}-{seed}"
    path = CACHE / f"{name}.json"
    if path.exists():
        return
    start, run = time.process_time(), Run(archive, seed)
    if fewer is None:
        model, spent = run.trained(WHOLE[arm]), 0
    else:
        model, spent = ARMS[arm](run, f"params:{100 - fewer:g}%")
    before = accuracy(model, archive)
    report = run.train(model, replace(AFTERWARDS, epochs=AFTERWARDS.epochs - spent), name)
    save(model, run.folder / f"{name}.safetensors")
    after, found = accuracy(model, archive), cost.measure(model, SHAPE)
    row = {
        "arm": arm,
        "fewer": fewer,
        "seed": seed,
        "params": found.params,
        "macs": found.macs,
        "before": before,
        "after": after,
        "epochs": FROM_NOTHING.epochs + AFTERWARDS.epochs,
        "loss": round(report.epochs[-1].loss, 4),
        "cpu_seconds": round(time.process_time() - start, 1),
    }
    write_json(path, row)
    print(json.dumps(row), flush=True)


def _speed(fewer: float) -> dict[str, Any]:
    """Images a second of what seed 0 left with so much fewer parameters, over the dense model's: all in turns."""
    folder = CACHE / "seed0"
    models = {("dense", "plain"): load(folder / "dense-0.safetensors")}
    for arm in ARMS:
        path = folder / f"{arm}-{fewer:g}-0.safetensors"
        if path.exists():
            models[arm, "plain"] = load(path)
            models[arm, "fused"] = fuse(models[arm, "plain"])
    found = throughput({"/".join(key): model for key, model in models.items()}, BATCH_SIZE, repeats=REPEATS)
    dense = found["dense/plain"]["images_per_second"]
    ratios: dict[str, dict[str, float]] = {}
    for arm, form in models:
        ratios.setdefault(arm, {})[form] = round(found[f"{arm}/{form}"]["images_per_second"] / dense, 3)
    del ratios["dense"]
    return {"fewer": fewer, "batch_size": BATCH_SIZE, "machine": machine(), "dense": round(dense, 1), "ratios": ratios}


if __name__ == "__main__":
    args = parser(__doc__.splitlines()[0])
    args.add_argument("--data", type=Path, help="folder of cifar10_jpeg.tar.xz")
    args.add_argument("--arms", nargs="+", choices=[*WHOLE, *ARMS], default=["dense", *ARMS])
    args.add_argument("--fewer", nargs="+", type=float, default=[50, 44, 60], help="percent of the parameters that go")
    args.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args.add_argument("--speed", type=float, metavar="FEWER", help="time the models of seed 0 at that budget in turns")
    args.add_argument("--note", action="append", default=[], help="a sentence for the report; may be repeated")
    args.add_argument("--report", action="store_true", help="write table and JSON of what is there")
    main(args.parse_args())
