"""Whether narrower attention helps: MLP widths (and ranks) with and without value channels or heads of attention.

    python -m bench.compare.attention_widths [--data FOLDER] [--images 700] [--judge 300] [--budgets 90 80 70 60]

ViT-Ti, no training. Of the 1000 calibration images the first `--images` are measured and all others judge: KL from the
dense model, and its difference from the plan without attention widths, image by image. No validation image is read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import data_folder, finish, parser
from bench.compare.methods import CHECKPOINT, MODEL
from vitlr.calibration.loop import calibrate
from vitlr.calibration.options import DEFAULT, OBJECTIVES
from vitlr.checkpoint.creation import create_model
from vitlr.data.loader import open_data
from vitlr.errors import InputError
from vitlr.measuring.timing import throughput
from vitlr.planning.planner import plan
from vitlr.surgery.application import apply

GRAINS = ("none", "query_keys", "channels", "heads")
STEPS = {"widths": 16, "joint": 1}  # of ranks


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder = data_folder(args.data)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT)
    archive = folder / "imagenet_calibration_1000.tar"
    measured = open_data(archive, model, batch_size=50, limit=args.images, workers=0)
    stats = calibrate(model, measured, objective=args.objective, hidden="attention")
    held = [
        images for images, *_ in open_data(archive, model, batch_size=50, skip=args.images, limit=args.judge, workers=0)
    ]
    dense = [_log_probabilities(model, images) for images in held]
    results: dict[str, Any] = {"objective": args.objective, "images": args.images, "judged": sum(map(len, held))}
    spectra, plain, models = None, {}, {"dense": model}
    for grain in GRAINS:
        for method in args.methods:
            for kept in args.budgets:
                options: dict[str, Any] = {"method": method, "attention": grain, "rank_step": STEPS[method]}
                try:
                    chosen = plan(model, stats, f"params:{kept}%", spectra=spectra, **options)
                except InputError as cause:
                    print(f"{method} {kept} %, {grain}: {cause}", flush=True)
                    continue
                spectra, small = chosen.spectra, apply(model, chosen)
                models[f"{method} {kept} {grain}"] = small
                kl = torch.cat([_divergence(p, _log_probabilities(small, x)) for p, x in zip(dense, held, strict=True)])
                more = kl - plain.setdefault((method, kept), kl)
                row = {
                    "kl": float(kl.mean()),
                    "more": float(more.mean()),
                    "standard_error": float(more.std() / len(more) ** 0.5),
                    "macs_kept": chosen.macs_kept / chosen.macs,
                    "attention": {w.name: w.width for w in chosen.widths if w.kind != "mlp"},
                }
                results[f"{method} {kept} {grain}"] = row
                print(
                    f"{method} {kept} %, {grain}: KL {row['kl']:.3f}, more {row['more']:+.3f} "
                    f"(standard error {row['standard_error']:.3f}), MACs kept {row['macs_kept']:.1%}",
                    flush=True,
                )
    if args.speed:
        found = throughput(models, 8, repeats=args.speed)
        for name, times in found.items():
            ratio = times["images_per_second"] / found["dense"]["images_per_second"]
            results.setdefault(name, {})["faster"] = ratio
            print(f"{name}: {ratio:.2f} times as fast as dense, batch 8", flush=True)
    finish("attention_widths", results, args.json)


@torch.no_grad()
def _log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    return F.log_softmax(model(images).double(), -1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of every image from log probabilities, in nats."""
    return (p.exp() * (p - q)).sum(-1)


if __name__ == "__main__":
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="the folder of the real inputs")
    args.add_argument("--images", type=int, default=700, help="calibration images measured; the others judge")
    args.add_argument("--judge", type=int, help="so many of them (default: all)")
    args.add_argument("--objective", choices=OBJECTIVES, default=DEFAULT)
    args.add_argument("--speed", type=int, default=0, metavar="N", help="time all models too, in N turns")
    args.add_argument("--methods", nargs="+", choices=STEPS, default=list(STEPS))
    args.add_argument("--budgets", type=int, nargs="+", default=[90, 80, 70, 60], help="kept parameters in per cent")
    main(args.parse_args())
