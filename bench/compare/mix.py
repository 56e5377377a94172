"""Bits alone and ranks, widths and bits together, on the real ViT-Ti: predicted loss and KL at equal bytes.

    python -m bench.compare.mix [--data FOLDER] [--sizes MB ...] [--json FILE]

Four of five calibration images are measured, the others judge. Neither validation images nor labels are read, so that
choices may be made by it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.common import BUILD, data_folder, finish, parser
from bench.compare.vit_tiny import CHECKPOINT, MODEL, calibration
from vitlr.calibration.loop import calibrate
from vitlr.checkpoint.creation import create_model
from vitlr.planning.planner import plan
from vitlr.surgery.application import apply

SIZES = (2.75, 2.2, 1.75, 1.5)  # MB of the file without its header
HELD_OUT = 5  # every fifth image, from the third on


def images(folder: Path, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Those that are measured, and those that judge."""
    every = torch.cat([batch for batch, _ in calibration(folder, model, BUILD / "compare_mix" / "images.pt")])
    judges = torch.arange(len(every)) % HELD_OUT == 2
    return every[~judges], every[judges]


@torch.inference_mode()
def kl(model: nn.Module, small: nn.Module, judges: Tensor, batch: int = 40) -> float:
    """KL(dense, small) in nats."""
    p, q = (torch.cat([net(x) for x in judges.split(batch)]).log_softmax(-1) for net in (model, small))
    return float((p.exp() * (p - q)).sum(-1).mean())


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder = data_folder(args.data)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT).eval()
    measured, judges = images(folder, model)
    stats = calibrate(model, measured.split(40), objective="loss", extras=("rounding",), hidden=True)
    spectra, rows = None, []
    print("| MB | method | widths | ranks | predicted | KL |\n|---|---|---|---|---|---|")
    for size in args.sizes:
        for method in ("mix", "bits"):
            chosen = plan(model, stats, f"bytes:{size * 1e6:.0f}", method=method, spectra=spectra)
            spectra = spectra or chosen.spectra
            row = {"method": method, "bytes": chosen.bytes_kept, "predicted": chosen.error, "ranks": chosen.ranks}
            row |= {"widths": chosen.narrowed, "kl": kl(model, apply(model, chosen), judges)}
            rows.append(row)
            cells = (size, method, len(chosen.narrowed), len(chosen.ranks), f"{chosen.error:.4f}", f"{row['kl']:.4f}")
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    finish("mix", {"rows": rows}, args.json)


if __name__ == "__main__":
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--sizes", type=float, nargs="+", default=list(SIZES), metavar="MB")
    main(args.parse_args())
