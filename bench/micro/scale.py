"""What calibrating a large model takes, counted: products an image, and bytes of sums, which processes send each other.

    python -m bench.micro.scale [--model NAME ...] [--json FILE]

`calibrate` with its defaults on one random image, random weights of the real widths, at one block and at two: what the
second one takes is what all further blocks are said to take. No second is measured here.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.common import finish, parser
from vitlr.calibration.hooks import COLUMNS
from vitlr.calibration.loop import calibrate
from vitlr.calibration.statistics import Statistics
from vitlr.checkpoint.creation import create_model

DEPTHS = {"vit_base_patch16_224": 12, "vit_large_patch16_224": 24, "vit_giant_patch14_dinov2": 40}


def counted(stats: Statistics) -> tuple[float, int]:
    """Floating point operations of one image, and bytes of all sums.

    A forward pass and one backward pass to the inputs, `t n²` for every moment of t tokens, and for what images give
    together `2 c t n + c n²`, c columns of a sketch.
    """
    operations = 2 * 2.0 * stats.macs
    for layer in stats.layers.values():
        tokens = layer.tokens / stats.images
        for key, tensor in layer.sums():
            if tensor.ndim == 2:
                n = len(tensor)
                operations += (2 * COLUMNS * tokens * n + COLUMNS * n**2) if "image" in key else tokens * n**2
    return operations, sum(tensor.nbytes for layer in stats.layers.values() for _, tensor in layer.own())


def measured(name: str, depth: int) -> tuple[float, int]:
    model = create_model(name, depth=depth, img_size=224, pretrained=False)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return counted(calibrate(model, [image], hidden=True, hidden_memory=1e12, progress=False))


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--model", nargs="+", default=[*DEPTHS])
    given = own.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    for name in given.model:
        one, two = measured(name, 1), measured(name, 2)
        block = [more - less for less, more in zip(one, two, strict=True)]
        operations, size = (first + (DEPTHS[name] - 1) * further for first, further in zip(one, block, strict=True))
        rows.append({"model": name, "blocks": DEPTHS[name], "gflop": operations / 1e9, "bytes": size})
        rows[-1] |= {"gflop_block": block[0] / 1e9, "bytes_block": block[1], "bytes_layer": block[1] / 4}
        print(
            f"{name}: {operations / 1e9:.0f} GFLOP an image, {size / 1e9:.2f} GB of sums; "
            f"a block {block[0] / 1e9:.1f} GFLOP, {block[1] / 1e6:.0f} MB"
        )
    finish("scale", {"rows": rows}, given.json)


if __name__ == "__main__":
    main()
