"""What a plan predicts, and what it costs: nats by kind of choice, on the real ViT-Ti.

    python -m bench.compare.predictions [--data FOLDER] [--out docs/results]

Four of five calibration images are measured, the others judge. Neither validation images nor labels are read, so that
choices may be made by it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import BUILD, CODE, ROOT, data_folder, machine, parser, write_json
from bench.compare.vit_tiny import CHECKPOINT, MODEL, calibration
from vitlr.calibration.loop import calibrate
from vitlr.checkpoint.creation import create_model
from vitlr.planning.planner import plan
from vitlr.surgery.application import apply

HELD_OUT = 5  # every fifth image, from the third on
SHARES = ("params:95%", "params:90%", "params:80%")
SIZES = tuple(f"bytes:{size}MB" for size in (2.75, 2.2, 1.75, 1.5))  # of the file without its header
KINDS: dict[str, list[tuple[str | None, dict[str, Any]]]] = {
    "bits, the same for all": [(None, {"bits": bits}) for bits in (8, 6, 4, 3, 2)],
    "bits": [(size, {"method": "bits"}) for size in SIZES],
    "bits, ranks and widths": [(size, {"method": "mix"}) for size in SIZES],
    "ranks": [(share, {"method": "lowrank"}) for share in SHARES],
    "widths": [(share, {"method": "widths"}) for share in SHARES],
    "ranks, widths, queries and keys": [(share, {"method": "joint"}) for share in SHARES],
    "ranks, then 4 bits": [(share, {"method": "lowrank", "bits": 4}) for share in SHARES],
    "widths, then 4 bits": [(share, {"method": "widths", "bits": 4}) for share in SHARES],
}


def images(folder: Path, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Those that are measured, and those that judge."""
    every = torch.cat([batch for batch, _ in calibration(folder, model, BUILD / "predictions" / "images.pt")])
    judges = torch.arange(len(every)) % HELD_OUT == 2
    return every[~judges], every[judges]


@torch.inference_mode()
def kl(model: nn.Module, small: nn.Module, judges: Tensor, batch: int = 40) -> float:
    """KL(dense, small) in nats."""
    p, q = (torch.cat([net(x) for x in judges.split(batch)]).log_softmax(-1) for net in (model, small))
    return float((p.exp() * (p - q)).sum(-1).mean())


def markdown(body: dict[str, Any]) -> str:
    """All rows, kind by kind."""
    made = body["machine"]
    lines = [
        "# Predicted and measured loss",
        "",
        f"ViT-Ti/16, nats: what a plan predicts, and KL(dense, small) on {body['judges']} calibration images that were "
        f"not among the {body['measured']} measured (objective `loss`). {made['processor']}, torch {made['torch']}, "
        f"{made['date']}, code {body['code']}. Made by `python -m bench.compare.predictions`.",
        "",
        "| kind | asked for | predicted | KL | KL / predicted |",
        "|---|---|---|---|---|",
    ]
    for row in body["rows"]:
        times = row["kl"] / row["predicted"]
        lines += [f"| {row['kind']} | {row['asked']} | {row['predicted']:.4f} | {row['kl']:.4f} | {times:.1f} |"]
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder = data_folder(args.data)
    model = create_model(MODEL, checkpoint=folder / CHECKPOINT).eval()
    measured, judges = images(folder, model)
    stats = calibrate(model, measured.split(40), objective="loss", extras=("rounding",), hidden=True)
    body: dict[str, Any] = {"code": CODE, "machine": machine(), "measured": len(measured), "judges": len(judges)}
    rows: list[dict[str, Any]] = []
    for kind, asked in KINDS.items():
        spectra = None
        for budget, options in asked:
            chosen = plan(model, stats, budget, spectra=spectra, **options)
            spectra = chosen.spectra if budget is not None else None
            what = budget or f"{options['bits']} bits"
            row = {"kind": kind, "asked": what, "predicted": chosen.error, "kept": chosen.bytes_kept}
            rows.append({**row, "kl": kl(model, apply(model, chosen), judges)})
            print(rows[-1], flush=True)
    body["rows"] = rows
    write_json(args.out / "predictions.json", body)
    (args.out / "predictions.md").write_text(markdown(body))


if __name__ == "__main__":
    args = parser(__doc__ or "")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the table goes")
    main(args.parse_args())
