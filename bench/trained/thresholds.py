"""Where the thresholds over learnt gates fall, and what that costs before any fine-tuning, on CIFAR-10.

    python -m bench.trained.thresholds [--data FOLDER] [--kept params:56% params:50%]

The ViT and the one epoch of gates are those of prune_cifar.py, seed 0, whose snapshots are used where they are there.
Accuracy is that on 5000 training images, every tenth: test images are for the final table only.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.common import finish, parser
from bench.trained.cifar import AFTERWARDS, Cifar, find_archive
from bench.trained.prune_cifar import L1, Run
from vitlr import evaluate, prune
from vitlr.pruning.options import THRESHOLDS
from vitlr.pruning.thresholds import table


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    archive = find_archive(args.data)
    run = Run(archive, 0)
    judged = Cifar(archive, "train", limit=5000)
    recipe = replace(AFTERWARDS, epochs=1, seed=0)
    how: dict[str, Any] = {"l1": L1, "tile": 1, "recipe": recipe, "finetune": False, "resume": run.folder / "vtp"}
    results: dict[str, Any] = {"dense": evaluate(run.trained(), judged).top1}
    print(f"dense: {results['dense']:.2f}", flush=True)
    for kept in args.kept:
        cuts = []
        for thresholds in THRESHOLDS:
            small = prune(run.trained(), run.images, budget=kept, thresholds=thresholds, **how)
            cuts.append(small.vitlr_pruning.cut)
            top1 = evaluate(small, judged).top1
            results[f"{kept} {thresholds}"] = {"top1": top1, **cuts[-1].to_dict()}
            print(f"{kept}, {thresholds}: {top1:.2f}", flush=True)
        print(table(cuts), flush=True)
        print(cuts[0], flush=True)
    finish("thresholds", results, args.json)


if __name__ == "__main__":
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="the folder of the real inputs")
    args.add_argument("--kept", nargs="+", default=["params:56%", "params:50%"], help="what is kept of the parameters")
    main(args.parse_args())
