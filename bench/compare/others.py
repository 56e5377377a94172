"""Bits of the matrices beside the linears on the real ViT-Ti: predicted, and KL, of each alone and of whole plans.

    python -m bench.compare.others [--data FOLDER] [--images 400] [--judges 100] [--sizes MB ...]

The plans are of `method="bits"`, with all of them at 7 bits and with bits chosen, whatever that promises. Calibration
images measure and judge, different ones.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch

from bench.common import data_folder, finish, parser
from bench.compare.predictions import images, kl
from bench.compare.vit_tiny import CHECKPOINT, MODEL
from vitlr.calibration.loop import calibrate
from vitlr.checkpoint.creation import create_model
from vitlr.planning import allocation
from vitlr.planning.planner import plan
from vitlr.runtime import compact
from vitlr.surgery.application import apply

SIZES = (2.75, 2.25, 1.75)  # MB of the file without its header


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder = data_folder(args.data)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT).eval()
    measured, judges = images(folder, model)
    judges = judges[: args.judges]
    batches = measured[: args.images].split(20)
    stats = calibrate(model, batches, objective="loss", extras=("rounding",), hidden=False)
    alone, plans, spectra = [], [], None
    for name, lost in stats.others.items():
        for bits, predicted in zip(compact.BITS, (lost / (2 * stats.images)).tolist(), strict=True):
            small = copy.deepcopy(model).requires_grad_(False)
            matrix = small.get_parameter(name)
            matrix.copy_(compact.rounded(matrix, bits))
            alone.append({"name": name, "bits": bits, "predicted": predicted, "kl": kl(model, small, judges)})
            print(f"{name:<26} {bits} bits  predicted {predicted:.4f}  KL {alone[-1]['kl']:.4f}", flush=True)
    allocation.PROMISE = 0.0  # the choice is judged here
    for size in args.sizes:
        for kind, known in (("7 bits", replace(stats, others={})), ("chosen", stats)):
            chosen = plan(model, known, f"bytes:{size * 1e6:.0f}", method="bits", spectra=spectra)
            spectra = spectra or chosen.spectra
            row = {"kind": kind, "bytes": chosen.bytes_kept, "predicted": chosen.error}
            row |= {"kl": kl(model, apply(model, chosen), judges), "bits": {o.name: o.bits for o in chosen.others}}
            plans.append(row)
            print(f"{size} MB  {kind}  predicted {chosen.error:.4f}  KL {row['kl']:.4f}  {row['bits']}", flush=True)
    finish("others", {"alone": alone, "plans": plans}, args.json)


if __name__ == "__main__":
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--images", type=int, default=400, help="calibration images that are measured")
    args.add_argument("--judges", type=int, default=100, help="images that judge")
    args.add_argument("--sizes", type=float, nargs="+", default=list(SIZES), metavar="MB")
    main(args.parse_args())
