"""What 8-bit floats cost the real ViT-Ti: top-1, agreement and KL against the dense model, by plain torch on a CPU.

python -m bench.compare.fp8 [--data FOLDER] [--images 1300] [--calibration 500]

Two models: weights rounded to the nearest, and so that the loss on calibration images moves least.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.common import BUILD, data_folder, parser, write_json
from bench.compare import vit_tiny
from vitlr.calibration.loop import calibrate
from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint.creation import create_model
from vitlr.surgery.fusion import fuse


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="folder of the real inputs")
    arguments.add_argument("--images", type=int, default=1300, help="validation images")
    arguments.add_argument("--calibration", type=int, default=500, help="images that weights are rounded by")
    arguments.add_argument("--stats", type=Path, help="file of their statistics, written where there is none")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    folder = data_folder(given.data)
    dense = create_model(vit_tiny.MODEL, checkpoint=folder / vit_tiny.CHECKPOINT).eval()
    stats = statistics(dense, folder, given.calibration, given.stats)
    models = {"nearest": fuse(dense, bits="fp8"), "by the loss": fuse(dense, bits="fp8", stats=stats)}
    images = vit_tiny.validation(folder, dense, BUILD / f"fp8-{given.images}.pt", limit=given.images)
    told = judged(dense, models, images)
    print(json.dumps(told, indent=1))
    if given.json is not None:
        write_json(given.json, told)
    return 0


def statistics(dense: nn.Module, folder: Path, images: int, kept: Path | None) -> Statistics:
    """Those of so many calibration images, read where they are kept."""
    if kept is not None and kept.exists():
        return Statistics.load(kept)
    seen = vit_tiny.calibration(folder, dense, BUILD / "calibration.pt")
    stats = calibrate(dense, [x for x, _ in islice(seen, images // 50)], extras=("rounding",), hidden=False)
    if kept is not None:
        stats.save(kept)
    return stats


@torch.inference_mode()
def judged(dense: nn.Module, models: dict[str, nn.Module], images: vit_tiny.Kept) -> dict[str, Any]:
    """Top-1 of all, and of the small ones how often they say the same and KL in nats an image."""
    right, same, nats = (defaultdict[str, float](float) for _ in range(3))
    count = 0
    for x, labels in images:
        theirs, count = dense(x), count + len(labels)
        right["dense"] += int((theirs.argmax(1) == labels).sum())
        for name, model in models.items():
            ours = model(x)
            right[name] += int((ours.argmax(1) == labels).sum())
            same[name] += int((ours.argmax(1) == theirs.argmax(1)).sum())
            ours, meant = ours.log_softmax(1), theirs.log_softmax(1)
            nats[name] += float(F.kl_div(ours, meant, log_target=True, reduction="sum"))
    share = lambda found: {name: round(100 * value / count, 3) for name, value in found.items()}  # noqa: E731
    nats_an_image = {name: round(value / count, 5) for name, value in nats.items()}
    return {"images": count, "top1": share(right), "same": share(same), "nats": nats_an_image}


if __name__ == "__main__":
    sys.exit(main())
