"""What 8-bit floats cost the real ViT-Ti: top-1, agreement and KL against the dense model, by plain torch on a CPU.

python -m bench.compare.fp8 [--data FOLDER] [--images 1300]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.common import BUILD, data_folder, parser, write_json
from bench.compare import vit_tiny
from vitlr.checkpoint.creation import create_model
from vitlr.surgery.fusion import fuse


@torch.inference_mode()
def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="folder of the real inputs")
    arguments.add_argument("--images", type=int, default=1300, help="validation images")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    folder = data_folder(given.data)
    dense = create_model(vit_tiny.MODEL, checkpoint=folder / vit_tiny.CHECKPOINT).eval()
    small = fuse(dense, bits="fp8")
    images = vit_tiny.validation(folder, dense, BUILD / f"fp8-{given.images}.pt", limit=given.images)
    found = dict.fromkeys(("images", "dense", "fp8", "same", "nats"), 0.0)
    for x, labels in images:
        theirs, ours = dense(x), small(x)
        found["images"] += len(labels)
        found["dense"] += int((theirs.argmax(1) == labels).sum())
        found["fp8"] += int((ours.argmax(1) == labels).sum())
        found["same"] += int((ours.argmax(1) == theirs.argmax(1)).sum())
        found["nats"] += float(F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="sum"))
    count = found.pop("images")
    shares = {name: round(value / count * (1 if name == "nats" else 100), 5) for name, value in found.items()}
    told = {"images": int(count), **shares}
    print(json.dumps(told, indent=1))
    if given.json is not None:
        write_json(given.json, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
