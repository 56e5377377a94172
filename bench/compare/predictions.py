"""What a plan predicts, and what it costs, by kind of choice: nats on the real ViT-Ti, distances of DINOv2's features.

    python -m bench.compare.predictions [--dinov2 FILE] [--data FOLDER] [--out docs/results]

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
from bench.compare.frontier.subjects import DINOV2, SIZE, pictures
from bench.compare.vit_tiny import CHECKPOINT, MODEL, calibration, calibration_tar
from vitlr.calibration.loop import calibrate
from vitlr.checkpoint.creation import create_model
from vitlr.planning.planner import plan
from vitlr.refinement.judge import Judge
from vitlr.surgery.application import apply

HELD_OUT = 5  # every fifth image, from the third on
SHARES = ("params:95%", "params:90%", "params:80%")
SIZES = {"vit_tiny": (2.75, 2.2, 1.75, 1.5), "dinov2": (9.4, 7.5, 6.0, 5.1)}  # MB of the file without its header
FIGURES = {"vit_tiny": "ViT-Ti/16, nats: KL", "dinov2": "DINOv2 ViT-S/14: ½ ‖f/‖f‖ − f̃/‖f̃‖‖² of features f"}


def kinds(model: str) -> dict[str, list[tuple[str | None, dict[str, Any]]]]:
    """What is asked for of a model: budgets, and how they are met."""
    sizes = [f"bytes:{size}MB" for size in SIZES[model]]
    return {
        "bits, the same for all": [(None, {"bits": bits}) for bits in (8, 6, 4, 3, 2)],
        "bits": [(size, {"method": "bits"}) for size in sizes],
        "bits, ranks and widths": [(size, {"method": "mix"}) for size in sizes],
        "ranks": [(share, {"method": "lowrank"}) for share in SHARES],
        "widths": [(share, {"method": "widths"}) for share in SHARES],
        "ranks, widths, queries and keys": [(share, {"method": "joint"}) for share in SHARES],
        "ranks, then 4 bits": [(share, {"method": "lowrank", "bits": 4}) for share in SHARES],
        "widths, then 4 bits": [(share, {"method": "widths", "bits": 4}) for share in SHARES],
    }


def opened(args: argparse.Namespace) -> tuple[str, nn.Module, Tensor]:
    """Which model it is, the model, and its calibration images."""
    folder, cache = data_folder(args.data), BUILD / "predictions"
    if args.dinov2 is None:
        model = create_model(MODEL, checkpoint=folder / CHECKPOINT).eval()
        return "vit_tiny", model, torch.cat([x for x, _ in calibration(folder, model, cache / "images.pt")])
    large = create_model(DINOV2, num_classes=0, checkpoint=args.dinov2)
    large.set_input_size(img_size=SIZE)  # type: ignore[operator]
    images = pictures(calibration_tar(folder), large, cache / "dinov2.pt")
    return "dinov2", large.eval(), torch.cat([x for x, _ in images])


def markdown(body: dict[str, Any]) -> str:
    """All rows, kind by kind."""
    made, figure = body["machine"], FIGURES[body["model"]]
    lines = [
        "# Predicted and measured loss",
        "",
        f"{figure}, of the dense model and the small one, beside what a plan predicts, on {body['judges']} calibration "
        f"images that were not among the {body['measured']} measured (objective `loss`). {made['processor']}, "
        f"torch {made['torch']}, {made['date']}, code {body['code']}. Made by `python -m bench.compare.predictions`.",
        "",
        "| kind | asked for | predicted | measured | measured / predicted |",
        "|---|---|---|---|---|",
    ]
    for row in body["rows"]:
        times = row["kl"] / row["predicted"]
        lines += [f"| {row['kind']} | {row['asked']} | {row['predicted']:.4f} | {row['kl']:.4f} | {times:.1f} |"]
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    name, model, images = opened(args)
    held = torch.arange(len(images)) % HELD_OUT == 2
    measured, judge = images[~held], Judge(model, images[held], batch_size=40)
    stats = calibrate(model, measured.split(40), objective="loss", extras=("rounding",), hidden=True)
    body: dict[str, Any] = {"model": name, "code": CODE, "machine": machine()}
    body |= {"measured": len(measured), "judges": len(judge.images)}
    rows: list[dict[str, Any]] = []
    for kind, asked in kinds(name).items():
        spectra = None
        for budget, options in asked:
            chosen = plan(model, stats, budget, spectra=spectra, **options)
            spectra = chosen.spectra if budget is not None else None
            what = budget or f"{options['bits']} bits"
            row = {"kind": kind, "asked": what, "predicted": chosen.error, "kept": chosen.bytes_kept}
            rows.append({**row, "kl": judge(apply(model, chosen)).kl})
            print(rows[-1], flush=True)
    body["rows"] = rows
    file = "predictions" if args.dinov2 is None else f"predictions_{name}"
    write_json(args.out / f"{file}.json", body)
    (args.out / f"{file}.md").write_text(markdown(body))


if __name__ == "__main__":
    args = parser(__doc__ or "")
    args.add_argument("--dinov2", type=Path, help="of a DINOv2 ViT-S/14 with these weights, in place of the ViT-Ti")
    args.add_argument("--data", type=Path, help="folder of the real inputs (default: VITLR_DATA or ../shared/data)")
    args.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the table goes")
    main(args.parse_args())
